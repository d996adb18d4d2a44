//! Pages of the host's memory as buffers that the device copies from (VK_EXT_external_memory_host): weights that go to the
//! device as they are stored need no staging buffer between the mapped file and the device.
//!
//! wgpu has no such buffers; its Vulkan layer takes them from outside.

use std::ops::Range;

use ash::{ext, vk};
use wgpu::hal::api::Vulkan;
use wgpu::hal::vulkan;

use super::device::Gpu;
use crate::error::{Error, Result};
use crate::weights::Map;

/// Pages are at least this large wherever files are mapped, and the last one of a map is there as a whole.
const PAGE: usize = 4096;
/// What the imported memory is to Vulkan.
const HANDLE: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

/// A device that imports the host's memory.
pub(super) struct HostImport {
    extension: ext::external_memory_host::Device,
    /// Of addresses and sizes.
    alignment: usize,
}

/// Imported pages, and where in them the bytes are.
pub(super) struct Imported {
    pub buffer: wgpu::Buffer,
    pub offset: u64,
}

impl HostImport {
    /// Opens a device as wgpu would, with the extension; `None` where the adapter lacks it.
    pub(super) fn open(
        adapter: &wgpu::Adapter,
        descriptor: &wgpu::DeviceDescriptor,
    ) -> Option<std::result::Result<(wgpu::Device, wgpu::Queue, HostImport), String>> {
        // SAFETY: nothing of the adapter is destroyed.
        let hal = unsafe { adapter.as_hal::<Vulkan>() }?;
        let capabilities = hal.physical_device_capabilities();
        let has_it = capabilities.supports_extension(ext::external_memory_host::NAME);
        // What it depends on is part of Vulkan 1.1.
        if !has_it || capabilities.properties().api_version < vk::API_VERSION_1_1 {
            return None;
        }
        let instance = hal.shared_instance().raw_instance();
        let mut limits = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut limits);
        // SAFETY: the device is the instance's own, and both structs are those of the call.
        unsafe { instance.get_physical_device_properties2(hal.raw_physical_device(), &mut properties) };
        let alignment = usize::try_from(limits.min_imported_host_pointer_alignment).ok().filter(|a| *a > 0)?;
        // SAFETY: the features are the adapter's own, the limits too; one extension that it has is added.
        let opened = unsafe {
            hal.open_with_callback(
                descriptor.required_features,
                &descriptor.required_limits,
                &descriptor.memory_hints,
                Some(Box::new(|device| device.extensions.push(ext::external_memory_host::NAME))),
            )
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return Some(Err(error.to_string())),
        };
        let extension = ext::external_memory_host::Device::new(instance, opened.device.raw_device());
        drop(hal);
        // SAFETY: the device was opened by this adapter with these features.
        let device = unsafe { adapter.create_device_from_hal(opened, descriptor) };
        let whole = |(device, queue)| (device, queue, HostImport { extension, alignment });
        Some(device.map(whole).map_err(|e| e.to_string()))
    }

    /// Imports the pages around `bytes` of a map.
    ///
    /// # Errors
    /// `Gpu` if the driver does not take them, or the map has no whole pages there.
    pub(super) fn import(&self, gpu: &Gpu, map: &Map, bytes: Range<usize>) -> Result<Imported> {
        let window = self.window(map, &bytes)?;
        let size = (window.end - window.start) as u64;
        // SAFETY: nothing of the device is destroyed but what is made here.
        let hal = unsafe { gpu.device.as_hal::<Vulkan>() }.ok_or_else(|| Error::gpu("not a Vulkan device"))?;
        let device = hal.raw_device();
        let refused = |e: vk::Result| Error::gpu(e.to_string());
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(HANDLE);
        let usage = vk::BufferUsageFlags::TRANSFER_SRC;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage).push_next(&mut external);
        // SAFETY: the struct is valid, and the device lives as long as `gpu`.
        let buffer = unsafe { device.create_buffer(&info, None) }.map_err(refused)?;
        // SAFETY: the window's pages belong to the map, which the buffer's guard keeps.
        let memory = unsafe { self.bind(&hal, buffer, window.start, size) }.inspect_err(|_| {
            // SAFETY: nobody has seen it.
            unsafe { device.destroy_buffer(buffer, None) };
        })?;
        let (owner, kept) = (device.clone(), map.clone());
        let release = move || {
            // SAFETY: wgpu calls this once, when the last submission that read the buffer is done, and before it destroys
            // the device. The map may go only now.
            unsafe {
                owner.destroy_buffer(buffer, None);
                owner.free_memory(memory, None);
            }
            drop(kept);
        };
        // SAFETY: the handle is valid until `release`, and nobody maps the buffer.
        let raw = unsafe { vulkan::Buffer::from_raw_externally_owned(buffer, Box::new(release)) };
        drop(hal);
        let usage = wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some("imported"), size, usage, mapped_at_creation: false };
        // SAFETY: the buffer is this device's, has this size and usage, and the file's bytes are in it.
        let buffer =
            gpu.checked("imported", || unsafe { gpu.device.create_buffer_from_hal::<Vulkan>(raw, &descriptor) })?;
        let offset = map.bytes().as_ptr().addr() + bytes.start - window.start;
        Ok(Imported { buffer, offset: offset as u64 })
    }

    /// Addresses of the pages around `bytes`.
    fn window(&self, map: &Map, bytes: &Range<usize>) -> Result<Range<usize>> {
        let begin = map.bytes().as_ptr().expose_provenance();
        let end = (begin + map.bytes().len()).next_multiple_of(PAGE);
        let start = (begin + bytes.start) / self.alignment * self.alignment;
        let window = start..(begin + bytes.end).next_multiple_of(self.alignment);
        if window.start < begin || window.end > end || bytes.is_empty() {
            return Err(Error::gpu(format!("no whole pages of {} bytes around them are mapped", self.alignment)));
        }
        Ok(window)
    }

    /// Memory of the pages at `address`, bound to the buffer.
    ///
    /// # Safety
    /// The pages are mapped until the memory is freed, and the buffer is this device's, with no memory yet.
    unsafe fn bind(
        &self,
        hal: &vulkan::Device,
        buffer: vk::Buffer,
        address: usize,
        size: u64,
    ) -> Result<vk::DeviceMemory> {
        let device = hal.raw_device();
        let refused = |e: vk::Result| Error::gpu(e.to_string());
        let pointer: *mut std::ffi::c_void = std::ptr::with_exposed_provenance_mut(address);
        let mut found = vk::MemoryHostPointerPropertiesEXT::default();
        let ask = self.extension.fp().get_memory_host_pointer_properties_ext;
        // SAFETY: the extension is enabled, and the pages are mapped.
        unsafe { ask(device.handle(), HANDLE, pointer, &mut found) }.result().map_err(refused)?;
        // SAFETY: the buffer is this device's, the physical device its own.
        let (needs, types) = unsafe {
            let instance = hal.shared_instance().raw_instance();
            let types = instance.get_physical_device_memory_properties(hal.raw_physical_device());
            (device.get_buffer_memory_requirements(buffer), types)
        };
        // Coherent: nobody flushes what the file's pages hold.
        let coherent =
            |(_, t): &(u32, &vk::MemoryType)| t.property_flags.contains(vk::MemoryPropertyFlags::HOST_COHERENT);
        let usable = needs.memory_type_bits & found.memory_type_bits;
        let mut types = (0u32..).zip(types.memory_types_as_slice()).filter(|(i, _)| usable >> i & 1 == 1);
        let (index, _) = types.find(coherent).ok_or_else(|| Error::gpu("no memory type takes them"))?;
        if needs.size > size {
            return Err(Error::gpu(format!("a buffer of {size} bytes needs {}", needs.size)));
        }
        let mut import = vk::ImportMemoryHostPointerInfoEXT::default().handle_type(HANDLE).host_pointer(pointer);
        let info = vk::MemoryAllocateInfo::default().allocation_size(size).memory_type_index(index);
        // SAFETY: address and size are multiples of the alignment, and the type is one that the driver named.
        let memory = unsafe { device.allocate_memory(&info.push_next(&mut import), None) }.map_err(refused)?;
        // SAFETY: both are this device's, and the memory is large enough.
        match unsafe { device.bind_buffer_memory(buffer, memory, 0) } {
            Ok(()) => Ok(memory),
            Err(error) => {
                // SAFETY: nobody has seen it.
                unsafe { device.free_memory(memory, None) };
                Err(refused(error))
            }
        }
    }
}
