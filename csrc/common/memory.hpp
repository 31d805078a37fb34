// Scratch memory, thread-local and reused from call to call.
#pragma once

#include <cstdint>
#include <memory>

namespace forktree {

// A buffer that its owner keeps: fresh pages would cost more time than a small step takes.
class Memory {
    std::unique_ptr<char[]> memory;
    int64_t size = 0;

public:
    char* get(int64_t bytes) {
        if (bytes + 64 > size) {
            memory.reset();
            memory.reset(new char[bytes + 64]);
            size = bytes + 64;
        }
        return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    }
};

}  // namespace forktree
