// Which instruction set runs, and how work is spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

namespace sgopd {

std::vector<std::string> available_isas();  // best first

// The name itself, or the best one for ""; throws std::invalid_argument for one this processor lacks.
std::string pick_isa(const std::string& isa);

// Calls part(i) for i in [0, count) on up to `threads` threads made for the call: no pool to survive a fork, no runtime
// to spin beside torch's. Tasks are taken in turn; what a task writes must not depend on which thread ran it.
template <typename Part>
void parallel(int64_t count, int64_t threads, const Part& part) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) part(i);
  };
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

}  // namespace sgopd
