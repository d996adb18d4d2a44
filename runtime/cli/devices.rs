//! `rewardrt devices`

use rewardrt::Result;
use serde_json::json;

use crate::args::Devices;
use crate::sink::print_line;

pub fn run(args: &Devices) -> Result<()> {
    let (cpu, gpus) = rewardrt::devices()?;
    if args.json {
        let gpus: Vec<_> = gpus
            .iter()
            .map(|d| {
                json!({
                    "name": d.name, "driver": d.driver, "backend": d.backend, "type": d.device_type.name(),
                    "max_binding_bytes": d.max_binding, "f16": d.has_f16, "subgroups": d.has_subgroups,
                    "matrix_tile": d.matrix_tile,
                })
            })
            .collect();
        let cpu = json!({"isa": cpu.isa, "available": cpu.available, "threads": cpu.threads});
        return print_line(&json!({"cpu": cpu, "gpus": gpus}).to_string());
    }
    let available = cpu.available.join(" ");
    print_line(&format!("cpu              {} threads, {} (of {available})", cpu.threads, cpu.isa))?;
    for d in &gpus {
        let features = [(d.has_f16, "f16"), (d.has_subgroups, "subgroups")];
        let mut features: Vec<_> =
            features.iter().filter(|(has, _)| *has).map(|(_, name)| (*name).to_owned()).collect();
        features.extend(d.matrix_tile.map(|n| format!("matrix units ({n} x {n}, f16)")));
        print_line(&format!(
            "gpu {:<12} {}\n                 {}, {}, bindings up to {} MiB, {}",
            d.device_type.name(),
            d.name,
            d.backend,
            d.driver,
            d.max_binding >> 20,
            features.join(" ")
        ))?;
    }
    if gpus.is_empty() {
        print_line("no graphics adapter was found")?;
    }
    Ok(())
}
