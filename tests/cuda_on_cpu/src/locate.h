// Sites: small numbers for places in the kernels, whether known as file and line or as a return
// address.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_on_cpu.h"

namespace cuemu {

using Site = uint32_t;

Site site_of(Place place);
Site site_of(const void* return_address);
std::string describe_site(Site site);

// Whether the address is in this shared object: its constants.
bool is_in_image(const void* address);

}  // namespace cuemu
