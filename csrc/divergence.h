// Divergences between a student's distribution p and a teacher's q, a column at a time, for C++ and CUDA.
//
// With u = log q - log p, a divergence is sum_v p_v f(u_v), and its gradient by the student's logits
// p_v (s(u_v) - E_p[s]), with the score s = f - df/du. f is chosen so that df/du = 0 at u = 0 (a multiple of e^u - 1
// changes neither the sum nor the gradient): an error in either log-sum-exp then enters at second order.
//
//     reverse KL          KL(p || q)                  f = e^u - 1 - u                    s = -u
//     forward KL          KL(q || p)                  f = e^u (u - 1) + 1                s = 1 - e^u
//     JSD, b              b KL(q || m) + (1-b) KL(p || m)
//                                                     f = b e^u (u - r) - (1 - b) r      s = -(1 - b) r
//     skew reverse KL, a  KL(p || m), b = 1 - a       f = -r + b (e^u - 1)               s = -r + b (e^(u-r) - 1)
//     skew forward KL, a  KL(q || m), b = a           f = e^u (u - r) - (1 - b)(e^u - 1) s = -(1 - b)(e^(u-r) - 1)
//     alpha, a            (1 - sum p^a q^(1-a)) / (a (1 - a))
//                         f = (a + (1 - a) e^u - e^((1-a) u)) / (a (1 - a))
//                         s = -(e^((1-a) u) - 1) / (1 - a)
//
// with m = b q + (1 - b) p and r = log(m / p). Sources: GKD (arXiv 2306.13649) for JSD, DistiLLM (arXiv 2402.03898) for
// the skew divergences, Amari's alpha-divergence.
#pragma once

#include <cmath>

// Internal linkage: a function compiled for one instruction set must not serve another.
#ifdef __CUDACC__
#define SGOPD_BOTH static __host__ __device__ inline
#else
#define SGOPD_BOTH static inline
#endif

namespace sgopd {

// As sgopd_kernels.options.DIVERGENCES numbers them.
enum Divergence : int { kReverseKL = 0, kForwardKL, kJSD, kSkewReverseKL, kSkewForwardKL, kAlpha, kDivergences };

SGOPD_BOTH bool is_kl(int divergence) { return divergence == kReverseKL || divergence == kForwardKL; }

// --- the two KLs, in float: hot, and written so that GCC keeps their loops in SIMD lanes (no && or ||) ---

// p f(u); by series where e^u - 1 - u would cancel.
template <bool kReverse>
SGOPD_BOTH float kl_value(float p, float q, float u) {
  const float series =
      kReverse ? 0.5f + u * (1.f / 6 + u * (1.f / 24 + u * (1.f / 120 + u * (1.f / 720 + u * (1.f / 5040)))))
               : 0.5f + u * (1.f / 3 + u * (1.f / 8 + u * (1.f / 30 + u * (1.f / 144 + u * (1.f / 840)))));
  const float near = p * u * u * series;
  const float far = kReverse ? (q - p) - p * u : (q * u - q) + p;
  const bool use_near = (std::fabs(u) < 0.25f) & (p > 0.f);
  return use_near ? near : far;
}

// The reverse KL's gradient needs no log-sum-exp: p (delta - E_p[delta]), delta = z - t, the mean as two floats.
SGOPD_BOTH float reverse_kl_gradient(float p, float delta, float mean_hi, float mean_lo) {
  return p * ((delta - mean_hi) - mean_lo);
}

// p - q = -p (e^u - 1)
SGOPD_BOTH float forward_kl_gradient(float p, float q, float u) {
  const float series = u * (1.f + u * (0.5f + u * (1.f / 6 + u * (1.f / 24 + u * (1.f / 120 + u * (1.f / 720))))));
  return std::fabs(u) < 0.25f ? -p * series : p - q;
}

// --- the others, in double, for the CPU ---

// log(m / p) with m = b q + (1 - b) p; neither cancels nor overflows.
SGOPD_BOTH double log_mixture_ratio(double u, double b) {
  return u < 30 ? log1p(b * expm1(u)) : u + log(b + (1 - b) * exp(-u));
}

struct ColumnTerms {
  double value, score;  // p f(u), p s(u)
};

// One column where p > 0.
SGOPD_BOTH ColumnTerms column(int divergence, double parameter, double p, double q, double u) {
  const double a = parameter;
  if (divergence == kAlpha) {
    const double power = u > 0 ? q * exp(-a * u) : p * exp((1 - a) * u);  // p^a q^(1-a)
    const double excess = u < 1 ? p * expm1((1 - a) * u) : power - p;
    return {(a * p + (1 - a) * q - power) / (a * (1 - a)), -excess / (1 - a)};
  }
  const double b = divergence == kSkewReverseKL ? 1 - a : a, r = log_mixture_ratio(u, b);
  const double from_q = q != 0 ? q * (u - r) : 0.0;
  if (divergence == kJSD) return {b * from_q - (1 - b) * p * r, -(1 - b) * p * r};
  const double excess = p * expm1(u - r);
  if (divergence == kSkewReverseKL) return {b * (q - p) - p * r, b * excess - p * r};
  return {from_q - (1 - b) * (q - p), -(1 - b) * excess};
}

// One column where p = 0: its value; it has no gradient.
SGOPD_BOTH double column_outside(int divergence, double parameter, double q) {
  const double a = parameter;
  switch (divergence) {
    case kJSD:
      return -a * q * log(a);
    case kSkewReverseKL:
      return (1 - a) * q;
    case kSkewForwardKL:
      return -q * (log(a) + (1 - a));
    default:
      return q / a;
  }
}

// --- the same in float, for devices, where double costs up to 64 times as much ---
//
// What cancels near u = 0 is a series there: with x = e^u - 1,
//     phi(x) = (1 + x) log(1 + x) - x,    lambda(x) = x - log(1 + x),    exponential(v) = e^v - 1 - v
// are of second order, and so are the f above in terms of them:
//     JSD               b phi(x) - phi(b x)
//     skew reverse KL   lambda(b x)
//     skew forward KL   phi(x) - phi(b x) - (1 - b) x log(1 + b x)
//     alpha             ((1 - a) exponential(u) - exponential((1 - a) u)) / (a (1 - a))

struct ColumnTerms32 {
  float value, score;  // p f(u), p s(u)
};

SGOPD_BOTH float expm1_32(float u) {
  const float series =
      u * (1.f + u * (1.f / 2 + u * (1.f / 6 + u * (1.f / 24 + u * (1.f / 120 + u * (1.f / 720 + u * (1.f / 5040)))))));
  return std::fabs(u) < 0.4f ? series : std::exp(u) - 1.f;
}

// log(1 + x) as 2 atanh(x / (2 + x)): a device's log has an absolute error near 1.
SGOPD_BOTH float log1p_32(float x) {
  const float s = x / (2.f + x), s2 = s * s;
  const float series = 2.f * s * (1.f + s2 * (1.f / 3 + s2 * (1.f / 5 + s2 * (1.f / 7 + s2 * (1.f / 9)))));
  return std::fabs(x) < 0.4f ? series : std::log(1.f + x);
}

SGOPD_BOTH float phi_32(float x) {  // |x| <= 0.25
  const float series =
      0.5f + x * (-1.f / 6 + x * (1.f / 12 + x * (-1.f / 20 + x * (1.f / 30 + x * (-1.f / 42 + x * (1.f / 56))))));
  return x * x * series;
}

// As `column`; nothing overflows.
SGOPD_BOTH ColumnTerms32 column32(int divergence, float parameter, float p, float q, float u) {
  const float a = parameter;
  const float x = expm1_32(u < 0.25f ? u : 0.25f);
  const bool near = std::fabs(u) < 0.2f;
  if (divergence == kAlpha) {
    const float c = 1.f - a, v = c * u;
    const float score = -(u < 1.f ? p * expm1_32(u < 1.f ? v : c) : q * std::exp(-a * u) - p) / c;
    if (near) {
      // exponential(v) / v^2
      const float at_u = 0.5f + u * (1.f / 6 + u * (1.f / 24 + u * (1.f / 120 + u * (1.f / 720))));
      const float at_v = 0.5f + v * (1.f / 6 + v * (1.f / 24 + v * (1.f / 120 + v * (1.f / 720))));
      return {p * u * u * (at_u - c * at_v) / a, score};
    }
    const float power = u > 0.f ? q * std::exp(-a * u) : p * std::exp(v);
    return {(a * p + c * q - power) / (a * c), score};
  }
  const float b = divergence == kSkewReverseKL ? 1.f - a : a, rest = 1.f - b;
  // Far on q's side by e^-u, elsewhere by x.
  const bool large = u > 0.2f;
  const float inverse = std::exp(large ? -u : 0.f);
  const float mixture = large ? b + rest * inverse : 1.f + b * x;     // m / q, or m / p
  const float r = large ? u + std::log(mixture) : log1p_32(b * x);    // log(m / p)
  const float excess = rest * (large ? 1.f - inverse : x) / mixture;  // q / m - 1
  const float from_q = large ? -q * std::log(mixture) : q * (u - r);  // q log(q / m)
  if (divergence == kJSD) {
    const float value = near ? p * (b * phi_32(x) - phi_32(b * x)) : b * from_q - rest * p * r;
    return {value, -rest * p * r};
  }
  if (divergence == kSkewReverseKL) {
    const float y = b * x;
    // (y - log(1 + y)) / y^2 = 1/2 - y/3 + y^2/4 - ...
    const float series =
        0.5f +
        y * (-1.f / 3 +
             y * (1.f / 4 +
                  y * (-1.f / 5 +
                       y * (1.f / 6 +
                            y * (-1.f / 7 + y * (1.f / 8 + y * (-1.f / 9 + y * (1.f / 10 + y * (-1.f / 11)))))))));
    return {near ? p * y * y * series : b * (q - p) - p * r, p * (b * excess - r)};
  }
  const float value = near ? p * (phi_32(x) - phi_32(b * x) - rest * x * r) : from_q - rest * (q - p);
  return {value, -rest * p * excess};
}

}  // namespace sgopd
