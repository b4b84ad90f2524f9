// x + gate * (W_2 f(W_1 m + b_1) + b_2), m = LN(x) * (1 + scale) + shift, and all its gradients, in
// double. Without modulations scale = shift = 0 and gate = 1.
#ifndef FASTFAR_TESTS_CPP_MLP_ORACLE_H_
#define FASTFAR_TESTS_CPP_MLP_ORACLE_H_

#include "common.h"

namespace test {

using Doubles = std::vector<double>;

struct MlpOracle {
  size_t rows, width, hidden;
  bool gelu;
  double eps;
  Doubles x, shift, scale, gate, norm_weight, norm_bias, w1, b1, w2, b2, dout;
  Doubles out, h, u;
  Doubles dx, dshift, dscale, dgate, dnorm_weight, dnorm_bias, dw1, db1, dw2, db2;

  double value(double a) const {
    return gelu ? a * 0.5 * std::erfc(-a / std::sqrt(2.0)) : a / (1.0 + std::exp(-a));
  }
  double slope(double a) const {
    if (gelu) {
      return 0.5 * std::erfc(-a / std::sqrt(2.0)) +
             a * std::exp(-0.5 * a * a) / std::sqrt(2.0 * 3.14159265358979324);
    }
    const double s = 1.0 / (1.0 + std::exp(-a));
    return s * (1.0 + a * (1.0 - s));
  }

  void run() {
    const double count = static_cast<double>(width);
    for (Doubles* each : {&out, &u, &dx, &dshift, &dscale, &dgate}) each->assign(rows * width, 0.0);
    h.assign(rows * hidden, 0.0);
    for (Doubles* each : {&dnorm_weight, &dnorm_bias, &db2}) each->assign(width, 0.0);
    db1.assign(hidden, 0.0);
    for (Doubles* each : {&dw1, &dw2}) each->assign(width * hidden, 0.0);
    Doubles n(width), l(width), m(width), a(hidden), du(width), dh(hidden), dn(width);
    for (size_t row = 0; row < rows; ++row) {
      const size_t at = row * width;
      double mean = 0.0, variance = 0.0;
      for (size_t i = 0; i < width; ++i) mean += x[at + i] / count;
      for (size_t i = 0; i < width; ++i)
        variance += (x[at + i] - mean) * (x[at + i] - mean) / count;
      const double rstd = 1.0 / std::sqrt(variance + eps);
      for (size_t i = 0; i < width; ++i) {
        n[i] = (x[at + i] - mean) * rstd;
        l[i] = n[i] * norm_weight[i] + norm_bias[i];
        m[i] = l[i] * (1.0 + scale[at + i]) + shift[at + i];
      }
      for (size_t j = 0; j < hidden; ++j) {
        double sum = b1[j];
        for (size_t i = 0; i < width; ++i) sum += w1[j * width + i] * m[i];
        h[row * hidden + j] = sum;
        a[j] = value(sum);
      }
      for (size_t i = 0; i < width; ++i) {
        double sum = b2[i];
        for (size_t j = 0; j < hidden; ++j) sum += w2[i * hidden + j] * a[j];
        u[at + i] = sum;
        out[at + i] = x[at + i] + gate[at + i] * sum;
        dgate[at + i] = dout[at + i] * sum;
        du[i] = dout[at + i] * gate[at + i];
        db2[i] += du[i];
      }
      for (size_t j = 0; j < hidden; ++j) {
        double sum = 0.0;
        for (size_t i = 0; i < width; ++i) {
          sum += du[i] * w2[i * hidden + j];
          dw2[i * hidden + j] += du[i] * a[j];
        }
        dh[j] = sum * slope(h[row * hidden + j]);
        db1[j] += dh[j];
      }
      double middle = 0.0, along = 0.0;
      for (size_t i = 0; i < width; ++i) {
        double dm = 0.0;
        for (size_t j = 0; j < hidden; ++j) {
          dm += dh[j] * w1[j * width + i];
          dw1[j * width + i] += dh[j] * m[i];
        }
        dshift[at + i] = dm;
        dscale[at + i] = dm * l[i];
        const double dl = dm * (1.0 + scale[at + i]);
        dnorm_weight[i] += dl * n[i];
        dnorm_bias[i] += dl;
        dn[i] = dl * norm_weight[i];
        middle += dn[i] / count;
        along += dn[i] * n[i] / count;
      }
      for (size_t i = 0; i < width; ++i) {
        dx[at + i] = dout[at + i] + rstd * (dn[i] - middle - n[i] * along);
      }
    }
  }
};

// A transposed copy of an (n, k) matrix.
inline Buffer<float> transposed(const Buffer<float>& w, int64_t n, int64_t k) {
  Buffer<float> result(n * k);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) result[j * n + i] = w[i * k + j];
  }
  return result;
}

inline Doubles widened(const Buffer<float>& x, int64_t count) {
  Doubles result;
  for (int64_t i = 0; i < count; ++i) result.push_back(double{x[i]});
  return result;
}

inline Doubles weights(const Buffer<float>& x, int64_t count, int32_t dtype) {
  Doubles result;
  for (int64_t i = 0; i < count; ++i) result.push_back(as_used(dtype, x[i]));
  return result;
}

}  // namespace test

#endif  // FASTFAR_TESTS_CPP_MLP_ORACLE_H_
