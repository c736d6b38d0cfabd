#include "Internal.h"

#include <stdarg.h>
#include <stdio.h>

const char *moec_error_name(int code) {
  switch (code) {
  case 0:
    return "OK";
#define MOEC_ERROR(number, name, text, sentence)                                                   \
  case number:                                                                                     \
    return text;
#include "moec/errors.def"
#undef MOEC_ERROR
  }
  return "E-UNKNOWN";
}

uint32_t moec_abi_version(void) { return MOEC_ABI; }

int moec_succeed(moec_error *error) {
  if (error) {
    error->code = 0;
    error->message[0] = 0;
  }
  return 0;
}

int moec_fail(moec_error *error, int code, const char *format, ...) {
  if (!error)
    return code;
  error->code = code;
  int size = (int)sizeof error->message;
  int n = snprintf(error->message, (size_t)size, "%s: ", moec_error_name(code));
  va_list args;
  va_start(args, format);
  int m = vsnprintf(error->message + n, (size_t)(size - n), format, args);
  va_end(args);
  if (m >= size - n) { /* cut: not in the middle of a UTF-8 character */
    int end = size - 1;
    while (end > 0 && ((unsigned char)error->message[end - 1] & 0xc0) == 0x80)
      --end;
    if (end > 0 && ((unsigned char)error->message[end - 1] & 0x80))
      --end;
    error->message[end] = 0;
  }
  return code;
}

int moec_check_struct(const void *s, size_t known, const char *where, const char *type,
                      moec_error *error) {
  size_t size;
  memcpy(&size, s, sizeof size);
  if (size < known)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s.struct_size: expected at least %zu, but got %zu; fill it with "
                     "MOEC_INIT",
                     where, type, known, size);
  if (size > 65536)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s.struct_size: expected at most 65536, but got %zu; fill it with "
                     "MOEC_INIT",
                     where, type, size);
  for (size_t i = known; i < size; ++i)
    if (((const unsigned char *)s)[i])
      return moec_fail(error, MOEC_E_ARGUMENT,
                       "%s: %s: expected zero beyond byte %zu, but got a field that this version "
                       "of the runtime does not know (byte %zu)",
                       where, type, known, i);
  return 0;
}
