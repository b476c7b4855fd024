// The row primitive's contract, shared by every native device. Plain data: no torch, no ownership.
#pragma once

#include <cstdint>

#include "divergence.h"

namespace sgopd {

// Columns of the statistics a call returns, one row of doubles a token (sgopd_kernels.oracle.TokenValues).
enum Column : int {
  kLoss = 0,
  kKL,
  kStudentLogprob,
  kTeacherLogprob,
  kStudentEntropy,
  kTeacherEntropy,
  kGate,
  kAgree,
  kColumns
};

struct HeadArgs {
  const float* bias;  // [V] or null
  float logit_scale;
  float softcap;  // 0: none
};

// Numbers of the call, by the names that Problem.row_numbers gives them. A further one is a word here.
#define SGOPD_ROW_NUMBERS(X) X(parameter) X(tolerance) X(ratio_clip)
#define SGOPD_NUMBER(name) double name;

struct RowsArgs {
  int64_t rows, vocabulary;
  float* student;  // [rows, V] projections in, gradient out
  int64_t student_stride;
  float* teacher;  // [rows, V] projections in, overwritten; null: teacher_logprob holds the teacher's word
  int64_t teacher_stride;
  float* reference;  // [rows, V] or null
  int64_t reference_stride;
  HeadArgs student_head, teacher_head, reference_head;
  const int64_t* token_ids;        // [rows]
  const float* verdict;            // [rows]
  const double* weights;           // [3, rows]: agree, conflict, neutral
  const int8_t* forced;            // [rows] or null: 1 agree, 0 conflict, -1 test
  const float* row_scale;          // [rows]: multiplies the gradient
  const float* teacher_logprob;    // [rows] or null
  const float* behaviour_logprob;  // [rows] or null
  double* stats;                   // [rows, kColumns]
  float* energy;                   // [rows, ceil(V / 32)] or null: squares of the gradient, summed over 32 columns
  bool sampled;                    // the estimator: on the sampled token; else over the vocabulary
  int divergence;
  SGOPD_ROW_NUMBERS(SGOPD_NUMBER)
  float inverse_temperature;
  bool gradient;
};

// What the sign gate makes of token n, whose log-ratio is d (sgopd_kernels.gate.choose).
struct Gated {
  double weight;
  bool agrees;
  bool counts;  // whether any weight of its rollout is not 0
};

SGOPD_BOTH Gated gated(const RowsArgs& a, int64_t n, double d) {
  const double signed_d = d * a.verdict[n];
  bool agrees = signed_d > a.tolerance, conflicts = signed_d < -a.tolerance;
  if (a.forced != nullptr && a.forced[n] >= 0) {
    agrees = a.forced[n] == 1;
    conflicts = !agrees;
  }
  const double agree = a.weights[n], conflict = a.weights[a.rows + n], neutral = a.weights[2 * a.rows + n];
  return {agrees ? agree : (conflicts ? conflict : neutral), agrees, agree != 0 || conflict != 0 || neutral != 0};
}

}  // namespace sgopd
