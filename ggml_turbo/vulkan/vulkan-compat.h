#pragma once

// What ggml-vulkan.cpp names of VK_EXT_layer_settings, for Vulkan headers older than 1.3.261 (Debian 12). Only
// GGML_VULKAN_VALIDATE uses it, and needs newer headers. It is included before everything else, so without vulkan.hpp,
// which is configured later.

#include <vulkan/vulkan_core.h>

#if defined(__cplusplus) && !defined(VK_EXT_layer_settings)

#include <stdint.h>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 };

struct LayerSettingEXT {
    const char        * layer, * name;
    LayerSettingTypeEXT type;
    uint32_t            count;
    const void        * values;
};

struct LayerSettingsCreateInfoEXT { // a loader skips what it does not know, and takes this one for empty
    VkStructureType sType = (VkStructureType) 1000496000;
    const void    * next  = nullptr;
    uint32_t        count = 0;
    const void    * settings = nullptr;

    template <typename T>
    LayerSettingsCreateInfoEXT(const T &) {}
};

} // namespace vk

#endif
