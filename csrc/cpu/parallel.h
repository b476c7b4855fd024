// How work is spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace sgopd {

// Calls part(i) for i in [0, count) on up to `threads` threads made for the call: no pool to survive a fork, no runtime
// to spin beside torch's. Tasks are taken in turn; what a task writes must not depend on which thread ran it. Where the
// system gives fewer threads, those do all the tasks. An exception ends the call, not the process.
template <typename Part>
void parallel(int64_t count, int64_t threads, const Part& part) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&] {
    try {
      for (int64_t i = next++; i < count && !failed; i = next++) part(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    while (static_cast<int64_t>(pool.size()) < threads - 1) pool.emplace_back(work);
  } catch (...) {  // a limit on processes, or no memory; the pool stays as it is
  }
  work();
  for (auto& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace sgopd
