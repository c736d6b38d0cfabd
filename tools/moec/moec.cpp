//===- moec.cpp - the driver ----------------------------------------------===//
//
// Part of the moec project, under the Apache License v2.0 with LLVM Exceptions.
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
//
//===----------------------------------------------------------------------===//

#include "Commands.h"

int main(int argc, char **argv) { return moec::tool::runDriver(argc, argv); }
