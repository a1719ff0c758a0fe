/* verify.h - what a kernel in a shared object is called with (mamba verify --so kernel.so).
 *
 * A kernel exports verify_kernel. It is called with the inputs of one case and with outputs that
 * come filled with NaN, each named as in the files of `mamba vectors`, and fills the outputs:
 * with backward = 0 out and hT (final_states); with backward = 1 the gradients, whose cotangents
 * dout and dhT (dfinal_states) are then among the inputs. Inputs that a case leaves out are not
 * in the list. An option of a case other than softplus (eps, group_size, silu) is an F64 tensor
 * of one value in host memory. It returns 0; or VERIFY_UNSUPPORTED, and the call is left out of the
 * verdict; anything else is a failure. */
#ifndef VERIFY_H
#define VERIFY_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { VERIFY_F64, VERIFY_F32, VERIFY_F16, VERIFY_BF16 };
enum { VERIFY_DONE, VERIFY_UNSUPPORTED };

struct tensor {
  const char* name;
  void* data; /* in host memory, or in the device's where call.device is 1 */
  int32_t dtype, ndim;
  int64_t shape[4], stride[4]; /* strides in elements */
};

struct call {
  const char* op; /* selective_scan, ssd, causal_conv1d, rms_norm or gated_rms_norm */
  int32_t softplus, backward, device, count;
  void* stream; /* a cudaStream_t where device is 1 */
  struct tensor* tensors;
};

int verify_kernel(const struct call* call);

#ifdef __cplusplus
}
#endif
#endif
