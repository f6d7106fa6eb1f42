// Runs CUDA kernels on the CPU, to test them: g++ -include emulation.h -x c++ KERNEL.cu.
//
// The threads of a block are fibers of one OS thread. A fiber runs to its next barrier or warp
// collective; blocks run one after the other. Only what this project's kernels use is here; what is
// missing does not compile.
#pragma once

#define __DEVICE_LAUNCH_PARAMETERS_H__  // threadIdx and the like are defined below
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // with red zones
#else
#define __shared__ static thread_local  // so that it can be found and filled
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

#include <thread>
#define EMULATION_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define EMULATION_UNCHECKED
#endif

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kMaxParameterBytes = 4096;
constexpr size_t kFreeSharedBytes = 48 << 10;  // that a block has without asking
constexpr size_t kMostSharedBytes = 99 << 10;  // of the devices from sm_80 on, where it is least

enum class State { kReady, kAtBarrier, kInCollective, kDone };

using Combine = uint64_t (*)(uint64_t, uint64_t);

// One thread of a block.
struct Fiber {
  ucontext_t context;
  void* stack_pointer;
  void* tsan;
  State state;
  uint3 index;
  uint32_t mask;  // of the collective that the fiber waits for
  uint64_t value;
  Combine combine;  // null: each lane gets the value of another
  unsigned distance;  // to that lane, by exclusive or
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> stacks;
  size_t dynamic_bytes;
  char* dynamic_shared;
  std::vector<std::unique_ptr<char[]>> all_dynamic_shared;  // of the grid: no block takes another's
  void (*run)(void*);
  void* arguments;
  int phase;       // number of the next barrier
  char* barriers;  // what TSan knows of them, by parity of the phase
};

static Block block;
static Fiber* current;
static Fiber scheduler;
static bool reversed;
static char error[200];
[[maybe_unused]] static char before_grid, after_grid;  // for TSan

// Saves the registers that a call preserves, and the stack; continues where `to` was saved.
#if defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
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
static void switch_context(Fiber& from, Fiber& to) {
  emulation_switch(&from.stack_pointer, to.stack_pointer);
}
static void start_context(Fiber& fiber, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 8;
  std::memset(top, 0, 8 * sizeof(void*));
  top[6] = reinterpret_cast<void*>(entry);  // behind the six registers; then a return address
  fiber.stack_pointer = top;
}
#else
static void switch_context(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
static void start_context(Fiber& fiber, char* stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, entry, 0);
}
#endif

EMULATION_UNCHECKED static void resume(Fiber& fiber) {
  Fiber* const from = current;
  current = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  switch_context(*from, fiber);
}

EMULATION_UNCHECKED static void wait(State state) {
  current->state = state;
  resume(scheduler);
}

EMULATION_UNCHECKED static void run_fiber() {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&before_grid);  // sees what came before the launch
  block.run(block.arguments);
  __tsan_release(&after_grid);  // is seen by what comes after it
#else
  block.run(block.arguments);
#endif
  wait(State::kDone);
}

EMULATION_UNCHECKED static void barrier() {
#if defined(__SANITIZE_THREAD__)
  char* const seen = &block.barriers[block.phase % 2];
  __tsan_release(seen);
  wait(State::kAtBarrier);
  __tsan_acquire(seen);
#else
  wait(State::kAtBarrier);
#endif
}

EMULATION_UNCHECKED static uint64_t collective(uint32_t mask, uint64_t value, Combine combine,
                                               unsigned distance = 0) {
  current->mask = mask;
  current->value = value;
  current->combine = combine;
  current->distance = distance;
  wait(State::kInCollective);
  return current->value;
}

// Lets the lanes of one warp go on whose collective all of them have reached.
EMULATION_UNCHECKED static bool finish_collective(Fiber* lanes, unsigned num_lanes) {
  for (unsigned first = 0; first < num_lanes; ++first) {
    const uint32_t mask = lanes[first].mask;
    const Combine combine = lanes[first].combine;
    if (lanes[first].state != State::kInCollective) continue;
    uint32_t present = 0;
    uint64_t result = lanes[first].value, values[kWarp] = {};
    for (unsigned i = 0; i < num_lanes; ++i) {
      const Fiber& lane = lanes[i];
      if (lane.state != State::kInCollective || lane.mask != mask || lane.combine != combine) {
        continue;
      }
      present |= 1u << i;
      values[i] = lane.value;
      if (combine) result = combine(result, lane.value);
    }
    if (present != mask) continue;
    for (unsigned i = 0; i < num_lanes; ++i) {
      if (!(mask >> i & 1)) continue;
      lanes[i].value = combine ? result : values[(i ^ lanes[i].distance) % kWarp];
      lanes[i].state = State::kReady;
    }
    return true;
  }
  return false;
}

// Lets waiting fibers go on. Returns false if none can.
EMULATION_UNCHECKED static bool release() {
  const unsigned num_threads = block.fibers.size();
  bool released = false;
  for (unsigned i = 0; i < num_threads; i += kWarp) {
    const unsigned num_lanes = num_threads - i < kWarp ? num_threads - i : kWarp;
    released |= finish_collective(&block.fibers[i], num_lanes);
  }
  if (released) return true;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kInCollective) return false;
  }
  ++block.phase;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady, released = true;
  }
  return released;
}

// Fills shared memory, which is all of this library's thread-local memory, with 0xFF.
static thread_local char in_shared_memory;
EMULATION_UNCHECKED static int fill_shared(dl_phdr_info* info, size_t, void*) {
  char* const begin = static_cast<char*>(info->dlpi_tls_data);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_TLS || !begin) continue;
    if (&in_shared_memory < begin || &in_shared_memory >= begin + segment.p_memsz) continue;
    std::memset(begin, 0xff, segment.p_memsz);
    return 1;
  }
  return 0;
}

EMULATION_UNCHECKED static inline void* dynamic_shared() { return block.dynamic_shared; }

EMULATION_UNCHECKED static bool run_block([[maybe_unused]] uint64_t number) {
  dl_iterate_phdr(fill_shared, nullptr);
  block.dynamic_shared = new char[block.dynamic_bytes];
  block.all_dynamic_shared.emplace_back(block.dynamic_shared);
  std::memset(block.dynamic_shared, 0xff, block.dynamic_bytes);
  current = &scheduler;
#if defined(__SANITIZE_THREAD__)
  scheduler.tsan = __tsan_get_current_fiber();
  block.stacks.reset(new char[block.fibers.size() * kStackBytes]);
  block.barriers = new char[2];
  // No two blocks of a grid share a TSan fiber, but grids run one after the other.
  static std::map<uint64_t, void*> pool;
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    void*& fiber = pool[number * block.fibers.size() + i];
    if (!fiber) fiber = __tsan_create_fiber(0);
    block.fibers[i].tsan = fiber;
  }
  __tsan_release(&before_grid);
#endif
  block.phase = 0;
  const unsigned num_threads = block.fibers.size();
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.state = State::kReady;
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    start_context(fiber, &block.stacks[i * kStackBytes], run_fiber);
  }
  do {
    for (unsigned i = 0; i < num_threads; ++i) {
      Fiber& fiber = block.fibers[reversed ? num_threads - 1 - i : i];
      if (fiber.state == State::kReady) resume(fiber);
    }
  } while (release());
  bool done = true;
  for (const Fiber& fiber : block.fibers) {
    done &= fiber.state == State::kDone;
  }
#if defined(__SANITIZE_THREAD__)
  delete[] block.barriers;
#endif
  return done;
}

static cudaError_t refuse(cudaError_t code, const char* reason) {
  std::snprintf(error, sizeof error, "%s", reason);
  return code;
}

// The bytes of dynamic shared memory that a kernel has asked for.
static std::map<const void*, size_t> dynamic_limits;

template <typename... Parameters>
cudaError_t set_attribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > kMostSharedBytes) {
    return refuse(cudaErrorInvalidValue, "attribute");
  }
  dynamic_limits[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

EMULATION_UNCHECKED static cudaError_t run_grid(const cudaLaunchConfig_t& config,
                                                size_t parameter_bytes, const void* kernel) {
  const dim3 b = config.blockDim, g = config.gridDim;
  const uint64_t num_threads = uint64_t{b.x} * b.y * b.z;
  if (num_threads < 1 || num_threads > 1024 || b.z > 64) {
    return refuse(cudaErrorInvalidConfiguration, "threads of a block");
  }
  if (g.x < 1 || g.x > INT32_MAX || g.y < 1 || g.y > 65535 || g.z < 1 || g.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "blocks of a grid");
  }
  if (parameter_bytes > kMaxParameterBytes) {
    return refuse(cudaErrorInvalidValue, "parameters");
  }
  if (config.dynamicSmemBytes > std::max(kFreeSharedBytes, dynamic_limits[kernel])) {
    return refuse(cudaErrorInvalidValue, "dynamic shared memory");
  }
  block.dynamic_bytes = config.dynamicSmemBytes;
  blockDim = b, gridDim = g;
  block.fibers.resize(num_threads);
#if !defined(__SANITIZE_THREAD__)
  block.stacks.reset(new char[num_threads * kStackBytes]);
#endif
  const uint64_t num_blocks = uint64_t{g.x} * g.y * g.z;
  for (uint64_t i = 0; i < num_blocks; ++i) {
    const uint64_t at = reversed ? num_blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(at % g.x), static_cast<unsigned>(at / g.x % g.y),
                static_cast<unsigned>(at / g.x / g.y)};
    bool done;
#if defined(__SANITIZE_THREAD__)
    // Nothing orders blocks, and each has its own shared memory.
    std::thread([&done, i] { done = run_block(i); }).join();
#else
    done = run_block(i);
#endif
    if (!done) return refuse(cudaErrorLaunchFailure, "threads wait for others for ever");
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&after_grid);
#endif
  block.all_dynamic_shared.clear();
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_const_t<Parameters>...> parameters;
  } call = {kernel, {arguments...}};
  block.arguments = &call;
  block.run = [](void* opaque) {
    const Call& call = *static_cast<const Call*>(opaque);
    std::apply(call.kernel, call.parameters);
  };
  return run_grid(*config, (sizeof(Parameters) + ... + 0), reinterpret_cast<const void*>(kernel));
}

}  // namespace emulation

#define cudaLaunchKernelEx emulation::launch
#define cudaFuncSetAttribute emulation::set_attribute
#define MMC_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulation::dynamic_shared())

static inline void __syncthreads() { emulation::barrier(); }

static inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return emulation::collective(mask, value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

inline double __shfl_xor_sync(uint32_t mask, double value, int distance) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = emulation::collective(mask, bits, nullptr, distance);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
inline T __ldg(const T* source) {
  return *source;
}

template <typename T>
inline void __stwb(T* target, T value) {
  *target = value;
}

// Whether threads and blocks run from the last to the first.
extern "C" void emulation_reverse(bool reverse) { emulation::reversed = reverse; }

// Why the last launch failed.
extern "C" const char* emulation_error() { return emulation::error; }
