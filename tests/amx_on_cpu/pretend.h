// Included before common/cpu_simd.cpp: a processor with AMX and a system that knows it.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" long amx_on_cpu_request(long number, long request, long feature);

inline int amx_on_cpu_cpuid(unsigned leaf, unsigned part, unsigned* eax, unsigned* ebx,
                            unsigned* ecx, unsigned* edx) {
  const int known = __get_cpuid_count(leaf, part, eax, ebx, ecx, edx);
  *edx |= 1u << 22 | 1u << 24;
  return known;
}

#define __get_cpuid_count amx_on_cpu_cpuid
#define syscall amx_on_cpu_request
