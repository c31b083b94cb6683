#include "locate.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <vector>

#include "runtime.h"

namespace cuemu {

namespace {

constexpr Site kPlaceBit = 0x80000000u;  // an index into places; without it an offset in the image

struct Image {
  std::string path;
  const char *base = nullptr, *begin = nullptr, *end = nullptr;
};

int find_segments(dl_phdr_info* info, size_t, void* data) {
  Image& image = *static_cast<Image*>(data);
  if (reinterpret_cast<const char*>(info->dlpi_addr) != image.base) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const char* segment = image.base + header.p_vaddr;
    if (image.begin == nullptr) image.begin = segment;
    image.begin = std::min(image.begin, segment);
    image.end = std::max(image.end, segment + header.p_memsz);
  }
  return 1;
}

const Image& this_image() {
  static const Image image = [] {
    Image result;
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&find_segments), &info);
    result.path = info.dli_fname;
    result.base = static_cast<const char*>(info.dli_fbase);
    dl_iterate_phdr(find_segments, &result);
    return result;
  }();
  return image;
}

std::vector<Place>& places() {
  static std::vector<Place> list;
  return list;
}

// The innermost inlined function that is neither the emulator's nor the C++ library's.
std::string ask_addr2line(Site offset) {
  char command[1024], line[1024];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x", this_image().path.c_str(),
                offset - 1);  // the return address is that of the next instruction
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "?";
  std::string first, found;
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    std::string text = line;
    text = text.substr(0, text.find_first_of(" \n"));
    const bool foreign = text.find("cuda_on_cpu/src/") != std::string::npos ||
                         text.find("/include/c++/") != std::string::npos;
    text = text.substr(text.rfind('/') + 1);
    if (first.empty()) first = text;
    if (found.empty() && !foreign) found = text;
  }
  pclose(pipe);
  return !found.empty() ? found : !first.empty() ? first : "?";
}

}  // namespace

Site site_of(Place place) {
  static std::map<std::pair<const char*, int>, Site> known;
  const auto [entry, is_new] = known.try_emplace({place.file, place.line}, 0);
  if (is_new) {
    entry->second = kPlaceBit | static_cast<Site>(places().size());
    places().push_back(place);
  }
  return entry->second;
}

Site site_of(const void* return_address) {
  return static_cast<Site>(static_cast<const char*>(return_address) - this_image().base);
}

std::string describe_site(Site site) {
  if ((site & kPlaceBit) != 0) return describe(places()[site & ~kPlaceBit]);
  static std::map<Site, std::string> known;
  const auto [entry, is_new] = known.try_emplace(site);
  if (is_new) entry->second = ask_addr2line(site);
  return entry->second;
}

bool is_in_image(const void* address) {
  return address >= this_image().begin && address < this_image().end;
}

}  // namespace cuemu
