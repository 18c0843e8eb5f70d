// The CPU: memory of the host, and threads of the standard library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace megatron_cpt {

struct Cpu {
  int64_t threads = 1;

  template <class T>
  using Array = std::vector<T>;

  template <class T>
  static std::vector<T> upload(const std::vector<T>& values) {
    return values;
  }

  // Memory for the length of one call.
  template <class T>
  class Scratch {
   public:
    Scratch(int64_t size, const Cpu&) : values_(size) {}
    Scratch(const std::vector<T>& values, const Cpu&) : values_(values) {}
    T* data() { return values_.data(); }

   private:
    std::vector<T> values_;
  };

  // function(0), ..., function(n - 1), each thread a stretch of them.
  template <class Function>
  void par_for(int64_t n, const Function& function) const {
    const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1));
    const auto run = [&](int64_t part) {
      for (int64_t i = n / parts * part + std::min(part, n % parts), end = i + n / parts + (part < n % parts); i < end; ++i) {
        function(i);
      }
    };
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
    run(0);
    for (std::thread& other : others) other.join();
  }
};

}  // namespace megatron_cpt
