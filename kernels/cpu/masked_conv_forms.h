// Winograd's minimal filtering along one axis: two neighbouring outputs of r ≥ 2 taps from r + 1
// products instead of 2r,
//
//   m_i = (Σ_l weight[i][l] g_l) · (Σ_k data[i][k] d_k),    y_j = Σ_i result[j][i] m_i
//                                                             = Σ_l g_l d_{j+l}.
//
// With more than two outputs y_j would be computed from inputs that it does not see, which cancel:
// NaN and rounding errors do not. Of two, y_0 is computed without d_r and y_1 without d_0, whatever
// the points: exactly what each sees. One tap is itself: one output, one product.
//
// Winograd 1980; as used for convolutions, Lavin and Gray 2015, arXiv:1509.09308.
#pragma once

#include <cstdint>

namespace fastvq {

constexpr int kMostFormTaps = 5;
constexpr int kMostFormPoints = kMostFormTaps + 1;

struct ConvForm {
  int taps, outputs, points;
  double data[kMostFormPoints][kMostFormPoints];
  double weight[kMostFormPoints][kMostFormTaps];
  double result[2][kMostFormPoints];
};

// Polynomials of degree r are evaluated at r finite points, of which the first is 0, and at
// infinity. Every entry of `data` and `result` is a float32 number for the points below.
constexpr ConvForm form_of_points(int taps, const double (&at)[kMostFormTaps]) {
  ConvForm form = {taps, 2, taps + 1, {}, {}, {}};
  for (int i = 0; i <= taps; ++i) {
    double size = 1.0, power = 1.0;
    form.data[i][0] = 1.0;
    for (int k = 0; k < taps; ++k) {  // times x - at[k]
      if (k == i) continue;
      for (int j = taps; j > 0; --j) {
        form.data[i][j] = form.data[i][j - 1] - at[k] * form.data[i][j];
      }
      form.data[i][0] *= -at[k];
      if (i < taps) size *= at[i] - at[k];
    }
    for (int l = 0; i < taps && l < taps; ++l, power *= at[i]) form.weight[i][l] = power / size;
    form.result[0][i] = i < taps ? 1.0 : 0.0;
    form.result[1][i] = i < taps ? at[i] : 1.0;
  }
  form.weight[taps][taps - 1] = 1.0;
  return form;
}

// By the number of taps. The points are those of the least rounding errors among a dozen tried.
constexpr ConvForm kConvForms[kMostFormTaps + 1] = {
    {},
    {1, 1, 1, {{1.0}}, {{1.0}}, {{1.0}}},
    form_of_points(2, {0.0, 1.0}),
    form_of_points(3, {0.0, 1.0, -1.0}),
    form_of_points(4, {0.0, 1.0, -0.5, -2.0}),
    form_of_points(5, {0.0, 0.75, -0.75, 1.5, -1.5}),
};

constexpr bool filters(const ConvForm& form) {
  for (int j = 0; j < form.outputs; ++j) {
    for (int l = 0; l < form.taps; ++l) {
      for (int k = 0; k < form.points; ++k) {
        double sum = k == j + l ? -1.0 : 0.0;
        for (int i = 0; i < form.points; ++i) {
          sum += form.result[j][i] * form.weight[i][l] * form.data[i][k];
        }
        if (sum > 1e-14 || sum < -1e-14) return false;
      }
    }
  }
  return true;
}
static_assert(filters(kConvForms[1]) && filters(kConvForms[2]) && filters(kConvForms[3]) &&
                  filters(kConvForms[4]) && filters(kConvForms[5]),
              "a form does not compute its convolution");

// A rectangle of taps, filtered in tiles of at most 2×2 outputs.
struct ConvTiling {
  int row_taps, column_taps;
  int64_t dy, dx;  // of the first tap
  const ConvForm& rows() const { return kConvForms[row_taps]; }
  const ConvForm& columns() const { return kConvForms[column_taps]; }
};

}  // namespace fastvq
