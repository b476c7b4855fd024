// As much of a CUDA device as csrc/cuda/rows.cuh asks for: a thread for each of the device's, barriers for its
// barriers.
//
// With DEVICE_THREADS they are threads of the system, and AddressSanitizer and ThreadSanitizer see what they do to one
// another's memory. Else they are fibers, of which the first one that no barrier holds runs on, in ascending order or
// in descending (device::descending). That takes milliseconds, and lets some run ahead of the others as far as the
// barriers allow: where one is missing, somebody reads what isn't there yet, or no more.
//
// Copies that a device makes in the background are made when they are waited for: what is read before isn't there.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#ifdef DEVICE_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __device__
#define __global__

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace device {

#ifdef DEVICE_THREADS
// std::barrier spins: more threads than processors, and none gets on.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void arrive_and_wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int mine = generation_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++generation_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return generation_ != mine; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int threads_, arrived_ = 0, generation_ = 0;
};
#else
inline bool descending = false;
inline ucontext_t scheduler;

struct Barrier {
  explicit Barrier(int threads) : threads(threads) {}
  void arrive_and_wait();
  int threads, arrived = 0, generation = 0;
};
#endif

using Lane = std::array<double, 8>;

struct Block {
  explicit Block(int threads) : all(threads), lanes{std::vector<Lane>(threads), std::vector<Lane>(threads)} {
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Barrier>(32));
  }
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<Lane> lanes[2];  // what a lane shows the others of its warp, in turn
  std::vector<std::unique_ptr<Block>>* cluster = nullptr;
  Barrier* cluster_all = nullptr;
  char* shared = nullptr;
};

// One of the device's threads.
struct Thread {
  Block* block = nullptr;
  unsigned number = 0;
  int turn = 0;
  std::vector<std::pair<float4*, const float*>> copies;
#ifndef DEVICE_THREADS
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  bool done = false;
  const Barrier* held = nullptr;
  int generation = 0;  // of the barrier that holds it
#endif
};

inline thread_local Thread* self;

}  // namespace device

inline thread_local struct {
  unsigned x;
} threadIdx;

#ifndef DEVICE_THREADS
inline void device::Barrier::arrive_and_wait() {
  const int now = generation;
  if (++arrived == threads) {
    arrived = 0;
    ++generation;
  }
  if (generation != now) return;
  self->held = this;
  self->generation = now;
  swapcontext(&self->context, &scheduler);
}
#endif

inline void __syncthreads() { device::self->block->all.arrive_and_wait(); }

namespace sgopd {
namespace cuda {

template <int kCount>
void exchange(const double (&own)[kCount], double (&other)[kCount], int offset) {
  device::Block& block = *device::self->block;
  auto& lanes = block.lanes[device::self->turn ^= 1];
  std::copy(own, own + kCount, lanes[threadIdx.x].begin());
  block.warps[threadIdx.x / 32]->arrive_and_wait();
  std::copy_n(lanes[threadIdx.x ^ offset].begin(), kCount, other);
}
inline void cluster_sync() { device::self->block->cluster_all->arrive_and_wait(); }
inline double cluster_read(double* own, int rank) {
  const device::Block& block = *device::self->block;
  return *reinterpret_cast<double*>((*block.cluster)[rank]->shared + (reinterpret_cast<char*>(own) - block.shared));
}
inline void copy_async(float4* to, const float* from) { device::self->copies.emplace_back(to, from); }
inline void copied() {
  for (const auto& [to, from] : device::self->copies) std::memcpy(to, from, sizeof(float4));
  device::self->copies.clear();
}

}  // namespace cuda
}  // namespace sgopd

namespace device {

// kernel(rank of the block, its shared memory), by every thread of a cluster.
template <typename Shared, typename Kernel>
void launch(int blocks, int threads, Kernel kernel) {
  std::vector<std::unique_ptr<Block>> cluster;
  std::vector<std::unique_ptr<Shared>> shared;
  Barrier all(blocks * threads);
  std::vector<std::unique_ptr<Thread>> running;
  for (int b = 0; b < blocks; ++b) {
    shared.push_back(std::make_unique<Shared>());
    std::memset(static_cast<void*>(shared[b].get()), 0xff, sizeof(Shared));  // NaN: what nobody has written
    cluster.push_back(std::make_unique<Block>(threads));
    cluster[b]->cluster = &cluster;
    cluster[b]->cluster_all = &all;
    cluster[b]->shared = reinterpret_cast<char*>(shared[b].get());
    for (int t = 0; t < threads; ++t) {
      running.push_back(std::make_unique<Thread>());
      running.back()->block = cluster[b].get();
      running.back()->number = static_cast<unsigned>(t);
    }
  }
  const auto run = [&](int i) {
    kernel(i / threads, *shared[i / threads]);
#ifndef DEVICE_THREADS
    running[i]->done = true;
#endif
  };
#ifdef DEVICE_THREADS
  std::vector<std::thread> system;
  for (int i = 0; i < blocks * threads; ++i) {
    system.emplace_back([&, i] {
      self = running[i].get();
      threadIdx.x = self->number;
      run(i);
    });
  }
  for (auto& thread : system) thread.join();
#else
  struct Start {
    decltype(run)* function;
    int number;
  };
  static Start start;  // of the fiber that begins
  for (auto& thread : running) {
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.data();
    thread->context.uc_stack.ss_size = thread->stack.size();
    thread->context.uc_link = &scheduler;
    makecontext(
        &thread->context,
        [] {
          const Start mine = start;
          (*mine.function)(mine.number);
        },
        0);
  }
  const auto next = [&] {
    for (int k = 0; k < blocks * threads; ++k) {
      const int i = descending ? blocks * threads - 1 - k : k;
      const Thread& t = *running[i];
      if (!t.done && (t.held == nullptr || t.held->generation != t.generation)) return i;
    }
    return -1;
  };
  for (int i = next(); i >= 0; i = next()) {
    self = running[i].get();
    self->held = nullptr;
    threadIdx.x = self->number;
    start = {&run, i};
    swapcontext(&scheduler, &self->context);
  }
  for (const auto& thread : running) {
    if (!thread->done) std::abort();  // the barriers hold them for ever
  }
#endif
}

}  // namespace device
