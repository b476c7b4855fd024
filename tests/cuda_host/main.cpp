// Row passes of a file of arguments, by the device's code on threads: test_cuda_host.py.
//
//     rows FILE BLOCKS [descending]     0: the kernel of one block; else that of a cluster of so many. Writes FILE.out
#include "device.h"
// after it: it stands for the device's own headers
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "../../csrc/cuda/rows.cuh"

namespace {

constexpr int kThreads = 64;

std::ifstream in;

template <typename T>
std::vector<T> take() {
  int64_t count = 0;
  in.read(reinterpret_cast<char*>(&count), sizeof(count));
  std::vector<T> values(count);
  in.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(count * sizeof(T)));
  return values;
}

// null for an array that isn't there
template <typename T>
T* at(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

}  // namespace

int main(int count, char** argv) {
  using namespace sgopd;
  in.open(argv[1], std::ios::binary);
  const int blocks = std::atoi(argv[2]);
#ifdef DEVICE_THREADS
  (void)count;
#else
  device::descending = count > 3;
#endif
  auto whole = take<int64_t>();  // rows, vocabulary, stride, sampled, divergence
  auto real = take<double>();    // parameter, tolerance, ratio_clip, temperature; of each head scale, softcap
  auto student = take<float>(), teacher = take<float>(), reference = take<float>();
  auto biases = std::vector<std::vector<float>>{take<float>(), take<float>(), take<float>()};
  auto ids = take<int64_t>();
  auto verdict = take<float>();
  auto weights = take<double>();
  auto forced = take<int8_t>();
  auto scale = take<float>(), teacher_logprob = take<float>(), behaviour_logprob = take<float>();
  std::vector<double> stats(whole[0] * kColumns, -1.0);

  RowsArgs a{};
  a.rows = whole[0];
  a.vocabulary = whole[1];
  a.student_stride = a.teacher_stride = a.reference_stride = whole[2];
  a.student = at(student);
  a.teacher = at(teacher);
  a.reference = at(reference);
  HeadArgs* heads[] = {&a.student_head, &a.teacher_head, &a.reference_head};
  for (int m = 0; m < 3; ++m)
    *heads[m] = {at(biases[m]), static_cast<float>(real[4 + 2 * m]), static_cast<float>(real[5 + 2 * m])};
  a.token_ids = at(ids);
  a.verdict = at(verdict);
  a.weights = at(weights);
  a.forced = at(forced);
  a.row_scale = at(scale);
  a.teacher_logprob = at(teacher_logprob);
  a.behaviour_logprob = at(behaviour_logprob);
  a.stats = stats.data();
  a.sampled = whole[3] != 0;
  a.divergence = static_cast<int>(whole[4]);
  a.parameter = real[0];
  a.tolerance = real[1];
  a.ratio_clip = real[2];
  a.inverse_temperature = static_cast<float>(1.0 / real[3]);
  a.gradient = true;

  const int team = blocks == 0 ? 1 : blocks, models = a.reference != nullptr ? 3 : a.teacher != nullptr ? 2 : 1;
  const int quads = blocks == 0 ? 0 : models * cuda::stage_quads(a.vocabulary, kThreads, team);
  std::vector<std::vector<float4>> stages(team, std::vector<float4>(quads * kThreads));
  device::launch<cuda::Shared<kThreads>>(team, kThreads, [&](int rank, cuda::Shared<kThreads>& shared) {
    for (int64_t n = 0; n < a.rows; ++n) {
      if (blocks == 0) {
        cuda::run_row<kThreads, false>(a, n, {shared}, nullptr);
      } else {
        cuda::run_row<kThreads, true>(a, n, {shared, rank, team}, stages[rank].data() + threadIdx.x);
      }
    }
  });
  std::ofstream out(std::string(argv[1]) + ".out", std::ios::binary);
  out.write(reinterpret_cast<const char*>(stats.data()), static_cast<std::streamsize>(stats.size() * sizeof(double)));
  out.write(reinterpret_cast<const char*>(student.data()),
            static_cast<std::streamsize>(student.size() * sizeof(float)));
}
