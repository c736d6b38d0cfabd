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

int moec_check_device(const DLTensor *t, const char *where, const char *name, moec_error *error) {
  if (t->device.device_type == kDLCPU)
    return 0;
  return moec_fail(error, MOEC_E_DEVICE,
                   "%s: %s: expected memory of the CPU (device type 1), but got device type %d",
                   where, name, (int)t->device.device_type);
}
