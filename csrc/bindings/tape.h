// What a binding says to a recording: which call was made, with which tensors, or that it cannot be replayed.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>

#include "../core/tape.h"
#include "tensors.h"

namespace pdn {
namespace bindings {

// Keep `tensor` alive as long as the tape, unless its memory is the tape's own.
inline void hold(Tape& tape, const Tensor& tensor) {
    if (tensor.numel() > 0 && !tape.arena->owns(tensor.data_ptr()))
        tape.held.push_back(std::make_shared<Tensor>(tensor));
}

inline void hold(Tape& tape, const std::optional<Tensor>& tensor) {
    if (tensor) hold(tape, *tensor);
}

// Run `call`, which captures raw pointers by value, and note it on the tape if this thread records. `tensors` are what
// the pointers belong to.
template <class Call, class... Tensors>
void run_and_record(const Call& call, const Tensors&... tensors) {
    call();
    if (Tape* tape = recording()) {
        (hold(*tape, tensors), ...);
        tape->steps.push_back(call);
    }
}

// This call cannot be replayed: the recording will be given up, with this reason.
inline void refuse_recording(const char* reason) {
    if (Tape* tape = recording())
        if (tape->refusal.empty()) tape->refusal = reason;
}

}  // namespace bindings
}  // namespace pdn
