//! Every shader has its twin and its head block, validates in every variant that is built, and binds what the twin's file
//! says; what is on matrix units also goes through the SPIR-V back end, without an adapter that has them.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use rewardrt::backend::gpu::{Flags, Format, TileShape, resolve};
use rewardrt::kernels::{ALL, Access, Kernel, attention_tiles};
use rewardrt::weights::Dtype;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn stems(name: &str, extension: &str) -> BTreeSet<String> {
    let paths = std::fs::read_dir(folder(name)).unwrap().map(|e| e.unwrap().path());
    let right = paths.filter(|p| p.extension().is_some_and(|e| e == extension));
    right.map(|p| p.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn include(name: &str) -> String {
    std::fs::read_to_string(folder("shaders/include").join(format!("{name}.wgsl"))).unwrap()
}

/// What follows `word` in the lines that begin with it.
fn after<'a>(source: &'a str, word: &str) -> BTreeSet<&'a str> {
    source.lines().filter_map(|line| line.trim().strip_prefix(word)).map(str::trim).collect()
}

/// The names that a shader's `#if` lines ask for, with those of what it includes.
fn asked(kernel: &Kernel) -> BTreeSet<String> {
    let includes = after(kernel.source, "#include ");
    let sources = includes.into_iter().map(include).chain([kernel.source.to_owned()]);
    sources.flat_map(|s| after(&s, "#if ").into_iter().map(str::to_owned).collect::<Vec<_>>()).collect()
}

/// The variants in which a kernel may be built: those flags that its source asks for.
fn variants(kernel: &Kernel) -> Vec<Flags> {
    let asked = asked(kernel);
    let asks = |name: &str| asked.contains(name);
    let either = |name: &str| if asks(name) { vec![false, true] } else { vec![false] };
    // Formats, and whether the adapter has f16.
    let mut formats = vec![(None, false)];
    if asks("F16_WEIGHTS") {
        formats = [(Dtype::F32, false), (Dtype::F16, false), (Dtype::F16, true), (Dtype::BF16, false)]
            .map(|(dtype, f16)| (Some(Format::Rows(dtype)), f16))
            .to_vec();
        formats.extend(asks("INT8").then_some((Some(Format::Int8), false)));
        formats.extend(asks("INT4").then_some((Some(Format::Int4), false)));
        formats.extend([8, 16].map(|tile| (Some(Format::Tiles(tile)), true)));
    } else if asks("TILE8") {
        formats = [8, 16].map(|tile| (Some(Format::Tiles(tile)), true)).to_vec();
    }
    let head = kernel.name == "head";
    let mut all = Vec::new();
    for (format, f16) in formats {
        let tiled = matches!(format, Some(Format::Tiles(_)));
        // One row is for ordinary instructions, a shape between few and many for matrix units.
        let shapes = match (asks("WIDE"), tiled) {
            (false, _) => vec![TileShape::Narrow],
            (true, false) if asks("ONE_ROW") => vec![TileShape::OneRow, TileShape::Narrow, TileShape::Wide],
            (true, true) if asks("MEDIUM") && !head => vec![TileShape::Narrow, TileShape::Medium, TileShape::Wide],
            (true, _) => vec![TileShape::Narrow, TileShape::Wide],
        };
        let head_dims = if asks("HEAD_ABOVE_128") { vec![64, 128, 256, 512] } else { vec![0] };
        let emulations = if tiled { either("EMULATED") } else { vec![false] };
        for shape in shapes {
            for &head_dim in &head_dims {
                for &emulated in &emulations {
                    for half_out in either("HALF_OUT") {
                        for half_kv in either("HALF_KV") {
                            for vec4 in either("VEC4") {
                                for subgroup in either("SUBGROUP") {
                                    for half_q in either("HALF_Q") {
                                        let f16 = f16 || half_out || half_kv || half_q;
                                        let few =
                                            Flags { subgroup, f16, vec4, format, shape, head, ..Flags::default() };
                                        let flags = Flags { emulated, half_out, half_kv, half_q, head_dim, ..few };
                                        all.push(flags);
                                        if asks("ONE_CHUNK") && tiled && shape == TileShape::Wide {
                                            all.push(Flags { one_chunk: true, ..flags });
                                        }
                                        all.extend(asks("ADAPTERS").then_some(Flags { adapters: true, ..flags }));
                                        let half_in = Flags { half_in: true, f16: true, ..flags };
                                        all.extend(asks("HALF_IN").then_some(half_in));
                                    }
                                }
                            }
                        }
                    }
                }
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
    twins.extend(
        ALL.iter()
            .map(|k| k.name.to_owned())
            .filter(|name| folder("runtime/kernels").join(name).join("mod.rs").exists()),
    );
    let listed: BTreeSet<String> = ALL.iter().map(|k| k.name.to_owned()).collect();
    assert_eq!(shaders, listed);
    assert!(shaders.is_subset(&twins), "{:?} have no twin", shaders.difference(&twins));
}

/// What holds for shaders and for what they include.
fn check_text(name: &str, source: &str) {
    for line in source.lines().filter(|l| l.contains("var<storage")) {
        assert!(line.contains("; // ("), "{name}: a binding without its shape: {line}");
    }
    assert_eq!(source.matches("#if ").count(), source.matches("#endif").count(), "{name}: unbalanced #if");
}

#[test]
fn every_shader_begins_with_its_purpose() {
    for kernel in ALL {
        let first = kernel.source.lines().next().unwrap();
        assert!(first.starts_with(&format!("// {}: ", kernel.name)), "{}: {first}", kernel.name);
        assert!(kernel.source.contains("owns"), "{}: the head block must say who owns which output", kernel.name);
        check_text(kernel.name, kernel.source);
    }
}

#[test]
fn what_is_included_is_there_and_has_a_head() {
    let files = stems("shaders/include", "wgsl");
    let included: BTreeSet<String> = ALL.iter().flat_map(|k| after(k.source, "#include ")).map(str::to_owned).collect();
    assert_eq!(files, included);
    for name in files {
        let source = include(&name);
        let head = source.lines().next().unwrap();
        assert!(head.starts_with("// ") && head.ends_with(['.', ',', ':']) || head.len() > 80, "{name}: {head}");
        assert!(after(&source, "#include ").is_empty(), "{name} includes something itself");
        check_text(&name, &source);
    }
}

/// A misspelt flag would be false for ever. Kernels share texts that ask for what only some of them set.
#[test]
fn every_flag_is_set_in_some_variants_only() {
    let all: Vec<Flags> = ALL.iter().flat_map(|k| variants(k)).collect();
    for name in ALL.iter().flat_map(|k| asked(k)).collect::<BTreeSet<String>>() {
        let asking = format!("#if {name}\nset\n#endif");
        let set = all.iter().filter(|flags| resolve(&asking, **flags).contains("set")).count();
        assert!(0 < set && set < all.len(), "{set} of {} variants set {name}", all.len());
    }
}

/// The module of a variant, valid with no more capabilities than its flags admit to.
fn validated(kernel: &Kernel, flags: Flags) -> (naga::Module, ModuleInfo) {
    let source = resolve(kernel.source, flags);
    let name = format!("{} {flags:?}", kernel.name);
    let module =
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    let mut capabilities = Capabilities::IMMEDIATES;
    capabilities.set(Capabilities::SUBGROUP, flags.subgroup || flags.needs_matrix_units());
    capabilities.set(Capabilities::SHADER_FLOAT16, flags.needs_f16());
    capabilities.set(Capabilities::COOPERATIVE_MATRIX, flags.needs_matrix_units());
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    (module, info)
}

fn check_bindings(kernel: &Kernel, flags: Flags, module: &naga::Module) {
    let name = format!("{} {flags:?}", kernel.name);
    let (mut bound, mut params) = (Vec::new(), Vec::new());
    for (_, variable) in module.global_variables.iter() {
        let access = match variable.space {
            naga::AddressSpace::WorkGroup | naga::AddressSpace::Private => continue,
            naga::AddressSpace::Immediate => {
                assert!(variable.binding.is_none(), "{name}");
                params.push(module.types[variable.ty].inner.size(module.to_ctx()) as usize);
                continue;
            }
            naga::AddressSpace::Storage { access } if access.contains(naga::StorageAccess::STORE) => Access::Write,
            naga::AddressSpace::Storage { .. } => Access::Read,
            ref other => panic!("{name}: {other:?}"),
        };
        let binding = variable.binding.as_ref().unwrap();
        assert_eq!(binding.group, 0, "{name}");
        bound.push((binding.binding as usize, variable.name.clone().unwrap(), access));
    }
    assert_eq!(params, [kernel.params_size], "{name}: size of Params");
    bound.sort_by_key(|b| b.0);
    let table: Vec<_> = kernel
        .bindings(flags.adapters)
        .enumerate()
        .map(|(i, (name, access))| (i + 1, name.to_owned(), access))
        .collect();
    assert_eq!(bound, table, "{name}");
}

/// Writes SPIR-V as it is built without checks.
fn write(kernel: &Kernel, flags: Flags, module: &naga::Module, info: &ModuleInfo) {
    let unchecked = BoundsCheckPolicies {
        index: BoundsCheckPolicy::Unchecked,
        buffer: BoundsCheckPolicy::Unchecked,
        ..BoundsCheckPolicies::default()
    };
    let options = spv::Options {
        lang_version: (1, 6),
        bounds_check_policies: unchecked,
        force_loop_bounding: false,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        ..spv::Options::default()
    };
    let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".to_owned() };
    let words = spv::write_vec(module, info, &options, Some(&entry))
        .unwrap_or_else(|e| panic!("{} {flags:?}: {e}", kernel.name));
    assert_eq!(words[0], 0x0723_0203);
}

#[test]
fn every_variant_validates_and_binds_what_its_twin_says() {
    for kernel in ALL {
        for flags in variants(kernel) {
            let (module, info) = validated(kernel, flags);
            check_bindings(kernel, flags, &module);
            if flags.is_tiled() {
                write(kernel, flags, &module, &info);
            }
        }
    }
}

/// The tile that the host dispatches by is the one that the shader computes.
#[test]
fn tiles_of_products_are_those_of_the_shader() {
    for kernel in ALL.iter().filter(|k| k.source.contains("#include products")) {
        for flags in variants(kernel) {
            let (module, _) = validated(kernel, flags);
            let constant = |name: &str| {
                let (_, found) = module.constants.iter().find(|(_, c)| c.name.as_deref() == Some(name)).unwrap();
                match module.global_expressions[found.init] {
                    naga::Expression::Literal(naga::Literal::U32(value)) => value,
                    ref other => panic!("{name}: {other:?}"),
                }
            };
            assert_eq!(flags.workgroup_tile(), [constant("ROWS"), constant("COLS")], "{} {flags:?}", kernel.name);
        }
    }
}

/// So is the workgroup memory by which the host tells what fits.
#[test]
fn workgroup_memory_of_attention_is_that_of_the_shader() {
    for flags in variants(&attention_tiles::KERNEL) {
        let (module, _) = validated(&attention_tiles::KERNEL, flags);
        let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
        let bytes: u32 = shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
        let Some(Format::Tiles(tile)) = flags.format else { panic!("{flags:?}") };
        let said = attention_tiles::workgroup_bytes(flags.shape, tile as usize, flags.head_dim as usize);
        assert_eq!(said, bytes as usize, "{flags:?}");
        assert!(bytes <= 32 << 10 || (tile, flags.head_dim) == (16, 512), "{flags:?}: {bytes} bytes");
    }
}
