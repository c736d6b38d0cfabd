#include "Internal.h"

#include <stdio.h>

int32_t moec_dtype(DLDataType t) {
  if (t.lanes == 1) {
    if (t.code == kDLFloat && t.bits == 32)
      return MOEC_DT_F32;
    if (t.code == kDLFloat && t.bits == 16)
      return MOEC_DT_F16;
    if (t.code == kDLBfloat && t.bits == 16)
      return MOEC_DT_BF16;
    if (t.code == kDLInt && t.bits == 32)
      return MOEC_DT_I32;
    if (t.code == kDLInt && t.bits == 64)
      return MOEC_DT_I64;
  }
  return MOEC_DT_OTHER;
}

int32_t moec_dtype_bytes(int32_t dtype) {
  return dtype == MOEC_DT_I64 ? 8 : dtype == MOEC_DT_F32 || dtype == MOEC_DT_I32 ? 4 : 2;
}

void moec_dtype_text(DLDataType t, char text[24]) {
  const char *kind = t.code == kDLInt      ? "i"
                     : t.code == kDLUInt   ? "u"
                     : t.code == kDLFloat  ? "f"
                     : t.code == kDLBfloat ? "bf"
                     : t.code == kDLBool   ? "bool"
                                           : NULL;
  if (!kind)
    snprintf(text, 24, "type code %u", t.code);
  else if (t.lanes != 1)
    snprintf(text, 24, "%s%ux%u", kind, t.bits, t.lanes);
  else
    snprintf(text, 24, "%s%u", kind, t.bits);
}

static void device_text(DLDevice d, char text[40]) {
  if (d.device_type == kDLCUDA)
    snprintf(text, 40, "CUDA device %d", d.device_id);
  else if (d.device_type == kDLCPU)
    snprintf(text, 40, "the CPU");
  else
    snprintf(text, 40, "device type %d", (int)d.device_type);
}

int moec_check_device(const DLTensor *t, DLDevice device, const char *where, const char *name,
                      moec_error *error) {
  if (t->device.device_type == device.device_type &&
      (device.device_type == kDLCPU || t->device.device_id == device.device_id))
    return 0;
  char want[40], got[40];
  device_text(device, want);
  device_text(t->device, got);
  return moec_fail(error, MOEC_E_DEVICE, "%s: %s: expected memory of %s, but got memory of %s",
                   where, name, want, got);
}
