// Runs CUDA kernels on the host as they are written, lane by lane, under a plain C++ compiler and its sanitizers.
//
// Every thread of a block is a fiber. Instructions of a warp (shuffles, votes, ldmatrix, products of matrices) wait
// until all 32 lanes have come to the same one; barriers wait for the block. A warp runs ahead as far as it can before
// the next one starts, in a forward or a backward order, so that a missing barrier shows as a wrong result. What an
// asynchronous copy writes is poison from the copy's start until its thread has waited for it. Shared memory is poison
// at the start and ends exactly where the launch says, for AddressSanitizer to watch.
//
// What this cannot show: whether the manual's tables of fragments are those of the hardware (they have been used on it
// before, in int8_conv2d), the rounding of the tensor cores' sums, and time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define PDN_EMULATED_CUDA
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define PDN_SHARED(name) char* const name = ::emulator::block->shared

#if !defined(__x86_64__)
#error "the fibers switch stacks with x86-64 instructions"
#endif

extern "C" void pdn_switch_stack(void** save, void* load);
asm(R"(
.text
.globl pdn_switch_stack
pdn_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulator {

struct Index {
    unsigned x = 0, y = 0;
};

[[noreturn]] inline void fail(const char* what) {
    std::printf("emulator: %s\n", what);
    std::fflush(stdout);
    std::_Exit(1);
}

struct Copy {
    char* to;
    const void* from;  // null: zeros
    int bytes;
};

// What a fiber waits for: that a number changes.
struct Event {
    const uint64_t* number = nullptr;
    uint64_t old = 0;
};

struct Fiber {
    void* stack_pointer = nullptr;
    bool done = false;
    Event event;
    std::vector<Copy> open;                 // copies of the group that is not yet committed
    std::vector<std::vector<Copy>> groups;  // committed, not yet landed
};

struct Warp {
    int arrived = 0;
    int operation = 0;
    uint64_t generation = 0;
    const void* in[32];
    void* out[32];
};

struct Block {
    char* shared = nullptr;
    int64_t shared_bytes = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    int waiting = 0;
    uint64_t barrier = 0;
    void* scheduler = nullptr;
    int current = 0;
    std::function<void()> body;
};

inline Block* block = nullptr;
inline int64_t bank_conflicts = 0;  // of ldmatrix: rows of one matrix in the same banks
inline bool backward = false;       // the order of warps

}  // namespace emulator

inline emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline Fiber& fiber() { return block->fibers[block->current]; }

inline void wait_for_change(const uint64_t& number, uint64_t old) {
    while (number == old) {
        Fiber& me = fiber();
        me.event = {&number, old};
        pdn_switch_stack(&me.stack_pointer, block->scheduler);
        me.event = {};
    }
}

__attribute__((no_sanitize("address", "undefined"), noinline)) inline void enter() {
    block->body();
    Fiber& me = fiber();
    if (!me.open.empty() || !me.groups.empty()) fail("a thread ended before its copies did");
    me.done = true;
    pdn_switch_stack(&me.stack_pointer, block->scheduler);
}

inline void run_block() {
    const int count = static_cast<int>(block->fibers.size());
    constexpr size_t kStack = 256 << 10;
    static std::vector<std::vector<char>> stacks;  // kept from block to block
    for (int i = 0; i < count; ++i) {
        Fiber& f = block->fibers[i];
        if (static_cast<int>(stacks.size()) <= i) stacks.emplace_back(kStack);
        auto* top =
            reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stacks[i].data()) + kStack) & ~uintptr_t{63});
        *--top = 0;                                   // aligned as at the entry of a function
        *--top = reinterpret_cast<uint64_t>(&enter);  // where `ret` goes
        for (int r = 0; r < 6; ++r) *--top = 0;
        f.stack_pointer = top;
    }
    for (int left = count; left > 0;) {
        bool moved = false;
        for (int w = 0; w < count / 32; ++w) {
            const int warp = backward ? count / 32 - 1 - w : w;
            for (bool again = true; again;) {
                again = false;
                for (int lane = 0; lane < 32; ++lane) {
                    Fiber& f = block->fibers[warp * 32 + lane];
                    if (f.done || (f.event.number && *f.event.number == f.event.old)) continue;
                    block->current = warp * 32 + lane, threadIdx.x = static_cast<unsigned>(block->current);
                    pdn_switch_stack(&block->scheduler, f.stack_pointer);
                    again = moved = true;
                    left -= f.done;
                }
            }
        }
        if (!moved) fail("deadlock: not all threads come to the same barrier or warp instruction");
    }
}

// Runs `kernel` on the host as kernel<<<blocks, threads, shared_bytes>>>(args...).
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Index blocks, int threads, int64_t shared_bytes, const Arguments&... args) {
    blockDim.x = static_cast<unsigned>(threads), gridDim = blocks;
    for (unsigned y = 0; y < (blocks.y ? blocks.y : 1); ++y)
        for (unsigned x = 0; x < blocks.x; ++x) {
            blockIdx.x = x, blockIdx.y = y;
            Block here;
            here.shared = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + 1023) / 1024 * 1024));
            here.shared_bytes = shared_bytes;
            std::memset(here.shared, 0xff, shared_bytes);
            here.fibers.resize(threads), here.warps.resize(threads / 32);
            here.body = [&] { kernel(args...); };
            block = &here;
            run_block();
            std::free(here.shared);
        }
    block = nullptr;
}

// One instruction of a warp: `compute(inputs, outputs)` runs once, when all lanes have given theirs.
template <typename Out, typename In, typename Compute>
Out together(int operation, const In& in, const Compute& compute) {
    Warp& warp = block->warps[block->current / 32];
    const int lane = block->current % 32;
    Out out;
    if (warp.arrived && warp.operation != operation) fail("lanes of a warp are at different instructions");
    warp.operation = operation;
    warp.in[lane] = &in, warp.out[lane] = &out;
    if (++warp.arrived < 32) {
        wait_for_change(warp.generation, warp.generation);
    } else {
        warp.arrived = 0;
        compute([&](int i) -> const In& { return *static_cast<const In*>(warp.in[i]); },
                [&](int i) -> Out& { return *static_cast<Out*>(warp.out[i]); });
        ++warp.generation;
    }
    return out;
}

inline char* at_shared(uint32_t address, int bytes, int alignment) {
    if (static_cast<int64_t>(address) + bytes > block->shared_bytes) fail("an access beyond shared memory");
    if (address % alignment) fail("a misaligned access to shared memory");
    return block->shared + address;
}

inline void start_copy(uint32_t to, const void* from, bool exists, int bytes) {
    char* target = at_shared(to, bytes, bytes);
    if (exists && reinterpret_cast<uintptr_t>(from) % bytes) fail("a misaligned copy");
    std::memset(target, 0xff, bytes);
    fiber().open.push_back({target, exists ? from : nullptr, bytes});
}

inline void land(size_t under_way) {
    auto& groups = fiber().groups;
    while (groups.size() > under_way) {
        for (const Copy& c : groups.front()) {
            if (c.from)
                std::memcpy(c.to, c.from, c.bytes);
            else
                std::memset(c.to, 0, c.bytes);
        }
        groups.erase(groups.begin());
    }
}

struct Registers {
    uint32_t r[4];
};

inline Registers load_matrices(uint32_t address, bool transposed) {
    return together<Registers>(transposed ? 2 : 1, address, [&](auto in, auto out) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t element[8][8];
            for (int row = 0; row < 8; ++row) {
                const uint32_t from = in(matrix * 8 + row);
                std::memcpy(element[row], at_shared(from, 16, 16), 16);
                for (int other = 0; other < row; ++other)
                    bank_conflicts += in(matrix * 8 + other) != from && (in(matrix * 8 + other) ^ from) % 128 == 0;
            }
            for (int lane = 0; lane < 32; ++lane) {
                uint16_t two[2];
                for (int e = 0; e < 2; ++e) {
                    const int i = lane / 4, j = lane % 4 * 2 + e;
                    two[e] = transposed ? element[j][i] : element[i][j];
                }
                std::memcpy(&out(lane).r[matrix], two, 4);
            }
        }
    });
}

// m16n8kK: A and B as bytes of fragments, element (row, k) by the manual's tables for elements of `BYTES` bytes.
template <int BYTES, typename Sum, typename Value>
void multiply(Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Value& value) {
    struct In {
        uint32_t a[4], b[2];
    } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    struct Out {
        Sum d[4];
    };
    constexpr int kDepth = 32 / BYTES, kEach = 4 / BYTES;
    const Out sums = together<Out>(10 + BYTES, mine, [&](auto in, auto out) {
        decltype(value(nullptr)) left[16][kDepth], right[8][kDepth];
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < kEach; ++e) {
                const int k = lane % 4 * kEach + e;
                for (int r = 0; r < 4; ++r)
                    left[lane / 4 + 8 * (r % 2)][k + kDepth / 2 * (r / 2)] =
                        value(reinterpret_cast<const char*>(&in(lane).a[r]) + e * BYTES);
                for (int r = 0; r < 2; ++r)
                    right[lane / 4][k + kDepth / 2 * r] =
                        value(reinterpret_cast<const char*>(&in(lane).b[r]) + e * BYTES);
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                Sum sum = 0;
                for (int k = 0; k < kDepth; ++k)
                    sum += left[lane / 4 + 8 * (i / 2)][k] * right[lane % 4 * 2 + i % 2][k];
                out(lane).d[i] = sum;
            }
    });
    for (int i = 0; i < 4; ++i) d[i] += sums.d[i];
}

template <typename T>
T shuffle(T x, int from) {
    struct In {
        T x;
        int from;
    };
    return together<T>(3, In{x, from}, [](auto in, auto out) {
        for (int lane = 0; lane < 32; ++lane) out(lane) = in(in(lane).from).x;
    });
}

}  // namespace emulator

inline void __syncthreads() {
    emulator::Block& b = *emulator::block;
    if (++b.waiting < static_cast<int>(b.fibers.size())) {
        emulator::wait_for_change(b.barrier, b.barrier);
    } else {
        b.waiting = 0, ++b.barrier;
    }
}
inline void __syncwarp() {
    emulator::together<int>(4, 0, [](auto, auto out) { out(0) = 0; });
}
template <typename T>
T __shfl_sync(uint32_t, T x, int lane) {
    return emulator::shuffle(x, lane & 31);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
    return emulator::shuffle(x, (emulator::block->current ^ mask) & 31);
}
inline bool __any_sync(uint32_t, bool x) {
    return emulator::together<bool>(5, x, [](auto in, auto out) {
        bool any = false;
        for (int i = 0; i < 32; ++i) any = any || in(i);
        for (int i = 0; i < 32; ++i) out(i) = any;
    });
}
inline uint32_t __ballot_sync(uint32_t, bool x) {
    return emulator::together<uint32_t>(6, x, [](auto in, auto out) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(in(i)) << i;
        for (int i = 0; i < 32; ++i) out(i) = votes;
    });
}
inline int atomicMin(int* to, int x) {
    const int old = *to;
    if (x < old) *to = x;
    return old;
}
template <typename T>
T __ldg(const T* p) {
    return *p;
}

#include "../../csrc/core/cuda_util.cuh"

namespace pdn {
namespace {

inline uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(static_cast<const char*>(p) - emulator::block->shared);
}
inline void copy16(uint32_t to, const void* from, bool exists) { emulator::start_copy(to, from, exists, 16); }
inline void copy4(uint32_t to, const void* from, bool exists) { emulator::start_copy(to, from, exists, 4); }
inline void copies_commit() {
    emulator::fiber().groups.push_back(std::move(emulator::fiber().open));
    emulator::fiber().open.clear();
}
template <int N>
void copies_wait() {
    emulator::land(N);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
    std::memcpy(r, emulator::load_matrices(address, false).r, 16);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    std::memcpy(r, emulator::load_matrices(address, true).r, 16);
}
inline Float4 load_shared4(uint32_t address) {
    Float4 x;
    std::memcpy(&x, emulator::at_shared(address, 16, 16), 16);
    return x;
}
inline void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply<1>(d, a, b0, b1, [](const char* p) { return static_cast<int>(static_cast<int8_t>(*p)); });
}
template <typename T>
void multiply(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply<2>(d, a, b0, b1, [](const char* p) {
        T x;
        std::memcpy(&x, p, 2);
        return to_float(x);
    });
}
template <typename T>
uint32_t pack2(T, float low, float high) {
    T two[2];
    from_float(low, two[0]), from_float(high, two[1]);
    uint32_t r;
    std::memcpy(&r, two, 4);
    return r;
}
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace
}  // namespace pdn
