//! Every shader has its twin and its head block, validates in every variant, and binds what the twin's file says.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use rewardrt::backend::gpu::{Flags, resolve};
use rewardrt::kernels::{ALL, Access, Kernel};
use rewardrt::weights::Dtype;

fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let right = paths.filter(|p| p.extension().is_some_and(|e| e == extension));
    right.map(|p| p.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn variants() -> Vec<Flags> {
    let mut all = Vec::new();
    for bits in 0..8u8 {
        let features = Flags { subgroup: bits & 1 > 0, f16: bits & 2 > 0, vec4: bits & 4 > 0, ..Flags::default() };
        for dtype in [None, Some(Dtype::F32), Some(Dtype::F16), Some(Dtype::BF16)] {
            all.push(Flags { dtype, ..features });
        }
        all.push(Flags { int8: true, ..features });
        for head_dim in [128, 129, 257] {
            all.push(Flags { head_dim, ..features });
            if features.f16 {
                let halves = [(true, false), (false, true), (true, true)];
                all.extend(halves.map(|(half_kv, half_out)| Flags { head_dim, half_kv, half_out, ..features }));
            }
        }
    }
    all
}

#[test]
fn every_shader_has_a_twin_in_the_table() {
    let shaders = stems("shaders", "wgsl");
    // A twin is a file, or a folder where it is several.
    let mut twins = stems("runtime/kernels", "rs");
    twins.extend(ALL.iter().map(|k| k.name.to_owned()).filter(|name| {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("runtime/kernels").join(name).join("mod.rs").exists()
    }));
    let listed: BTreeSet<String> = ALL.iter().map(|k| k.name.to_owned()).collect();
    assert_eq!(shaders, listed);
    assert!(shaders.is_subset(&twins), "{:?} have no twin", shaders.difference(&twins));
}

#[test]
fn every_shader_begins_with_its_purpose() {
    for kernel in ALL {
        let first = kernel.source.lines().next().unwrap();
        assert!(first.starts_with(&format!("// {}: ", kernel.name)), "{}: {first}", kernel.name);
        assert!(kernel.source.contains("owns"), "{}: the head block must say who owns which output", kernel.name);
        for line in kernel.source.lines().filter(|l| l.contains("var<storage")) {
            assert!(line.contains("; // ("), "{}: a binding without its shape: {line}", kernel.name);
        }
        let opened = kernel.source.matches("#if ").count();
        assert_eq!(opened, kernel.source.matches("#endif").count(), "{}: unbalanced #if", kernel.name);
    }
}

fn check(kernel: &Kernel, flags: Flags) {
    let source = resolve(kernel.source, flags);
    let name = format!("{} {flags:?}", kernel.name);
    let module =
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    let mut capabilities = Capabilities::empty();
    capabilities.set(Capabilities::SUBGROUP, flags.subgroup);
    capabilities.set(Capabilities::SHADER_FLOAT16, flags.f16);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));

    let mut bound = Vec::new();
    for (_, variable) in module.global_variables.iter() {
        let Some(binding) = &variable.binding else { continue };
        assert_eq!(binding.group, 0, "{name}");
        let access = match variable.space {
            naga::AddressSpace::Uniform => {
                assert_eq!(binding.binding, 0, "{name}");
                let size = module.types[variable.ty].inner.size(module.to_ctx());
                assert_eq!(size as usize, kernel.params_size, "{name}: size of Params");
                continue;
            }
            naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => Access::Write,
            naga::AddressSpace::Storage { .. } => Access::Read,
            ref other => panic!("{name}: {other:?}"),
        };
        bound.push((binding.binding as usize, variable.name.clone().unwrap(), access));
    }
    bound.sort_by_key(|b| b.0);
    let table: Vec<_> =
        kernel.bindings.iter().enumerate().map(|(i, (name, access))| (i + 1, (*name).to_owned(), *access)).collect();
    assert_eq!(bound, table, "{name}");
}

#[test]
fn every_variant_validates_and_binds_what_its_twin_says() {
    for kernel in ALL {
        for flags in variants() {
            check(kernel, flags);
        }
    }
}
