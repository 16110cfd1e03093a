// Runs CUDA kernels on the host as they are written, lane by lane, under a plain C++ compiler and its sanitizers.
//
// Every thread of a block is a fiber. Instructions of a warp (shuffles, votes, ldmatrix, products of matrices) wait
// until all 32 lanes have come to the same one; barriers wait for the block. A warp runs ahead as far as it can before
// the next one starts, in a forward or a backward order, so that a missing barrier shows as a wrong result. What an
// asynchronous copy writes is poison from the copy's start until its thread has waited for it. Shared memory is poison
// at the start and ends exactly where the launch says, for AddressSanitizer to watch.
//
// Products of a warpgroup read their operands when they start and compare them when they end; their sums are poison in
// between, what copies wrote must have been fenced, and so must registers after every wait. All lanes of a warp must
// come to them, and to barriers, together, and the warps of a warpgroup to the same products.
//
// What this cannot show: whether the manual's tables of fragments and descriptors are understood as the hardware does,
// the rounding of the tensor cores' sums, and time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
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

// A product of a warpgroup under way, as one lane sees it.
struct Product {
    void* sums;            // the registers that it adds to
    const uint32_t* left;  // those that it reads, or null, and what they held
    uint32_t left_values[4];
    std::vector<std::pair<uint32_t, int>> ranges;  // of shared memory that it reads, and what they held
    std::vector<char> held;
};

// The true contents of registers that products add to; until those are waited for, the registers hold poison.
struct Sums {
    void* registers;
    int count;
    std::vector<char> values;
};

struct Fiber {
    void* stack_pointer = nullptr;
    bool done = false;
    Event event;
    std::vector<Copy> open;                 // copies of the group that is not yet committed
    std::vector<std::vector<Copy>> groups;  // committed, not yet landed
    std::vector<Copy> unfenced;             // landed, not yet seen by the tensor cores' own reads
    std::vector<Product> open_products;
    std::vector<std::vector<Product>> product_groups;
    std::vector<Sums> sums;  // of products under way
    bool registers_fenced = false;
};

struct Warp {
    int arrived = 0;
    int operation = 0;
    uint64_t generation = 0;
    const void* in[32];
    void* out[32];
    std::vector<uint64_t> products;  // right operands, depths and widths of those that it started
};

struct Block {
    int barrier_count[16] = {}, barrier_threads[16] = {};
    uint64_t barrier_generation[16] = {};
    std::vector<char> unseen;  // bytes of shared memory that the tensor cores' own reads might not see yet
    char* shared = nullptr;
    int64_t shared_bytes = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    int waiting = 0;
    uint64_t barrier = 0;
    uint64_t rounds = 0;  // of the scheduler
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
    if (!me.open_products.empty() || !me.product_groups.empty()) fail("a thread ended before its products did");
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
        ++block->rounds;
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
    for (int arrived : block->barrier_count)
        if (arrived) fail("a barrier was left with threads that nobody waited for");
    for (size_t w = 0; w < block->warps.size(); ++w)
        if (block->warps[w].products != block->warps[w / 4 * 4].products)
            fail("the warps of a warpgroup started different products");
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
            here.shared_bytes = shared_bytes, here.unseen.assign(shared_bytes, 0);
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

// An instruction that all lanes of a warp must come to together, and no more.
inline void aligned(int operation) {
    together<char>(operation, 0, [](auto, auto) {});
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
            std::memset(&block->unseen[c.to - block->shared], 1, c.bytes);
            fiber().unfenced.push_back(c);
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

// ------------------------------------------------------------------------------------- products of a warpgroup (wgmma)

// Address of a byte of an operand: descriptors with a 128-byte swizzle, as the manual's section on wgmma has them.
struct Operand {
    uint32_t start, panel, group;

    explicit Operand(uint64_t d)
        : start((d & 0x3fff) << 4), panel((d >> 16 & 0x3fff) << 4), group((d >> 32 & 0x3fff) << 4) {
        if (d >> 62 != 1 || (d >> 49 & 7) != 0) fail("a descriptor without a 128-byte swizzle");
    }
    static uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }
    uint32_t along(int row, int byte) const { return swizzled(start + row / 8 * group + row % 8 * 128 + byte); }
    uint32_t down(int column, int depth) const {  // 16-bit elements
        return swizzled(start + column / 64 * panel + depth / 8 * group + depth % 8 * 128 + column % 64 * 2);
    }
};

inline const char* seen(uint32_t address, int bytes) {
    const char* p = at_shared(address, bytes, bytes);
    for (int i = 0; i < bytes; ++i)
        if (block->unseen[address + i]) fail("the tensor cores read a copy that no fence has made visible");
    return p;
}

template <typename Sum>
Sums& sums_of(Sum* registers, int count) {
    for (Sums& s : fiber().sums)
        if (s.registers == registers) return s;
    Sums s{registers, count, {}};
    s.values.assign(reinterpret_cast<char*>(registers), reinterpret_cast<char*>(registers + count));
    std::memset(registers, 0xff, count * sizeof(Sum));
    fiber().sums.push_back(s);
    return fiber().sums.back();
}

// Starts a product of 64 rows: this warp's 16 times N columns. `left(row, k)` and `right(column, k)` give elements in
// shared memory as (address, bytes); `a`: the left operand is in registers instead, 16 x 16 elements of 16 bits;
// `operand`: the right one's descriptor.
template <int N, typename Sum, typename Value, typename Left, typename Right>
void start_product(Sum (&d)[N / 8][4], int depth, bool add, const uint32_t* a, uint64_t operand, const Left& left,
                   const Right& right, int bytes, const Value& value) {
    struct In {
        uint32_t a[4];
        uint64_t b;
    } mine{{}, operand};
    if (a) std::memcpy(mine.a, a, 16);
    struct Out {
        Sum d[N / 8][4];
    };
    if (!fiber().registers_fenced) fail("a product without a fence of its registers");
    Product product{&d[0][0], a, {mine.a[0], mine.a[1], mine.a[2], mine.a[3]}, {}, {}};
    auto note = [&product](uint32_t address, int size) {
        const char* p = seen(address, size);
        product.ranges.push_back({address, size});
        product.held.insert(product.held.end(), p, p + size);
        return p;
    };
    const Out result = together<Out>(1000 + N + (a ? 1 : 0), mine, [&](auto in, auto out) {
        for (int lane = 0; lane < 32; ++lane)
            if (in(lane).b != operand) fail("the lanes of a product name different operands");
        auto& products = block->warps[block->current / 32].products;
        products.insert(products.end(), {operand, static_cast<uint64_t>(depth), static_cast<uint64_t>(N)});
        std::vector<decltype(value(nullptr))> l(16 * depth), r(N * depth);
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < depth; ++k) {
                if (a) {
                    const uint32_t& word = in(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
                    l[row * depth + k] = value(reinterpret_cast<const char*>(&word) + k % 2 * 2);
                } else {
                    l[row * depth + k] = value(note(left(block->current % 128 / 32 * 16 + row, k), bytes));
                }
            }
        for (int column = 0; column < N; ++column)
            for (int k = 0; k < depth; ++k) r[column * depth + k] = value(note(right(column, k), bytes));
        Sum sums[16][N];
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < N; ++column) {
                Sum sum = 0;
                for (int k = 0; k < depth; ++k) sum += l[row * depth + k] * r[column * depth + k];
                sums[row][column] = sum;
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int j = 0; j < N / 8; ++j)
                for (int i = 0; i < 4; ++i)
                    out(lane).d[j][i] = sums[lane / 4 + i / 2 * 8][j * 8 + lane % 4 * 2 + i % 2];
    });
    Sums& sums = sums_of(&d[0][0], N / 2);
    Sum* values = reinterpret_cast<Sum*>(sums.values.data());
    for (int i = 0; i < N / 2; ++i) values[i] = (add ? values[i] : 0) + (&result.d[0][0])[i];
    fiber().open_products.push_back(std::move(product));
}

inline void land_products(size_t under_way) {
    Fiber& me = fiber();
    while (me.product_groups.size() > under_way) {
        for (const Product& p : me.product_groups.front()) {
            if (p.left && std::memcmp(p.left, p.left_values, 16)) fail("registers changed while a product read them");
            const char* held = p.held.data();
            for (auto [address, bytes] : p.ranges) {
                if (std::memcmp(block->shared + address, held, bytes))
                    fail("shared memory changed while a product read it");
                held += bytes;
            }
        }
        const auto group = std::move(me.product_groups.front());
        me.product_groups.erase(me.product_groups.begin());
        me.registers_fenced = false;
        for (size_t i = 0; i < me.sums.size();) {
            bool busy = false;
            for (const auto& other : me.product_groups)
                for (const Product& p : other) busy = busy || p.sums == me.sums[i].registers;
            for (const Product& p : me.open_products) busy = busy || p.sums == me.sums[i].registers;
            if (busy) {
                ++i;
                continue;
            }
            for (int b = 0; b < me.sums[i].count * 4; ++b)
                if (static_cast<char*>(me.sums[i].registers)[b] != '\xff') fail("registers changed under a product");
            std::memcpy(me.sums[i].registers, me.sums[i].values.data(), me.sums[i].values.size());
            me.sums.erase(me.sums.begin() + i);
        }
    }
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

namespace emulator {

inline int code(const char* p) { return static_cast<int8_t>(*p); }
template <typename T>
float number(const char* p) {
    T x;
    std::memcpy(&x, p, 2);
    return pdn::to_float(x);
}

}  // namespace emulator

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
    emulator::multiply<1>(d, a, b0, b1, emulator::code);
}
template <typename T>
void multiply(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::multiply<2>(d, a, b0, b1, emulator::number<T>);
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

inline void fence_products() {
    emulator::aligned(200);
    emulator::fiber().registers_fenced = true;
}
inline void commit_products() {
    emulator::aligned(201);
    emulator::fiber().product_groups.push_back(std::move(emulator::fiber().open_products));
    emulator::fiber().open_products.clear();
}
template <int N = 0>
void wait_products() {
    emulator::aligned(202);
    const uint64_t& rounds = emulator::block->rounds;  // products take long: other warps run first
    if (emulator::fiber().product_groups.size() > static_cast<size_t>(N)) emulator::wait_for_change(rounds, rounds);
    emulator::land_products(N);
}
inline void fence_copies() {
    for (const auto& c : emulator::fiber().unfenced)
        std::memset(&emulator::block->unseen[c.to - emulator::block->shared], 0, c.bytes);
    emulator::fiber().unfenced.clear();
}
template <int N>
void take_registers() {
    emulator::aligned(203);
}
template <int N>
void give_registers() {
    emulator::aligned(204);
}
inline void barrier_arrive(int barrier, int threads) {
    emulator::Block& b = *emulator::block;
    if (barrier < 1 || barrier > 15 || threads % 32 != 0) emulator::fail("no such barrier");
    emulator::aligned(300 + barrier);
    if (b.barrier_count[barrier] && b.barrier_threads[barrier] != threads)
        emulator::fail("threads come to a barrier with different counts");
    b.barrier_threads[barrier] = threads;
    if (++b.barrier_count[barrier] == threads) b.barrier_count[barrier] = 0, ++b.barrier_generation[barrier];
}
inline void barrier_wait(int barrier, int threads) {
    const uint64_t& generation = emulator::block->barrier_generation[barrier];
    const uint64_t old = generation;
    barrier_arrive(barrier, threads);
    emulator::wait_for_change(generation, old);
}
template <typename T>
void settle(const T&) {}

template <typename T>
void product_async(T, float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    const emulator::Operand left(a), right(b);
    emulator::start_product<128>(
        d, 16, add, nullptr, b, [&](int row, int k) { return left.along(row, k * 2); },
        [&](int column, int k) { return right.along(column, k * 2); }, 2, emulator::number<T>);
}
inline void product_async(int8_t, int (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    const emulator::Operand left(a), right(b);
    emulator::start_product<128>(
        d, 32, add, nullptr, b, [&](int row, int k) { return left.along(row, k); },
        [&](int column, int k) { return right.along(column, k); }, 1, emulator::code);
}
template <typename T, int N>
void product_async(T, float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) {
    const emulator::Operand right(b);
    emulator::start_product<N * 8>(
        d, 16, true, a, b, [](int, int) { return 0u; }, [&](int column, int k) { return right.down(column, k); }, 2,
        emulator::number<T>);
}

}  // namespace
}  // namespace pdn
