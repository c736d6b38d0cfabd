/* Opens a folder that is not there and prints the error: the smallest use of libmoec. */
#include "moec.h"
#include <stdio.h>

int main(void) {
  moec_model *model = NULL;
  moec_error error;
  int code = moec_open("/nonexistent.moec", NULL, &model, &error);
  printf("%u.%u %s\n%s\n", (unsigned)(moec_abi_version() >> 16),
         (unsigned)(moec_abi_version() & 0xffff), moec_error_name(code), error.message);
  return code != 0 && model == NULL ? 0 : 1;
}
