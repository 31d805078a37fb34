// Scratch.
#pragma once

#include <cstdint>
#include <memory>

namespace forktree {

// Memory that stays with its thread from call to call: fresh pages would cost more than small steps take.
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
