/* The smallest kernel that mamba verify judges: an rms_norm, forward. Build and judge it:
 *   cc -O2 -shared -fPIC -I. tests/verify_example.c -o example.so -lm
 *   ./mamba verify --so example.so --op rms_norm */
#include <math.h>
#include <string.h>

#include "verify.h"

static struct tensor* find(const struct call* call, const char* name) {
  for (int i = 0; i < call->count; ++i)
    if (strcmp(call->tensors[i].name, name) == 0) return &call->tensors[i];
  return 0;
}

int verify_kernel(const struct call* call) {
  if (strcmp(call->op, "rms_norm") || call->backward || call->device) return VERIFY_UNSUPPORTED;
  const struct tensor* x = find(call, "x"); /* (batch, L, d) */
  if (x->dtype != VERIFY_F32) return VERIFY_UNSUPPORTED;
  const float *in = x->data, *weight = find(call, "weight")->data;
  const double eps = *(const double*)find(call, "eps")->data;
  float* out = find(call, "out")->data;
  const int64_t rows = x->shape[0] * x->shape[1], d = x->shape[2];
  for (int64_t r = 0; r < rows; ++r) {
    float sum = 0;
    for (int64_t c = 0; c < d; ++c) sum += in[r * d + c] * in[r * d + c];
    const float scale = 1 / sqrtf(sum / (float)d + (float)eps);
    for (int64_t c = 0; c < d; ++c) out[r * d + c] = in[r * d + c] * scale * weight[c];
  }
  return VERIFY_DONE;
}
