//! The header, read: what the generated programs are made from.

use std::collections::BTreeSet;

pub const HEADER: &str = include_str!("../../ffi/include/rewardrt.h");

/// A function of the header.
#[derive(Debug, PartialEq)]
pub struct Function {
    pub name: String,
    pub returns: String,
    pub parameters: Vec<Parameter>,
}

#[derive(Debug, PartialEq)]
pub struct Parameter {
    /// Without spaces around `*`: `const rrt_model*`.
    pub kind: String,
    pub name: String,
}

impl Parameter {
    pub fn is_pointer(&self) -> bool {
        self.kind.ends_with('*') || self.kind == "rrt_log_fn"
    }

    /// The struct that it points to, for reading or for writing.
    pub fn target(&self) -> &str {
        self.kind.trim_start_matches("const ").trim_end_matches('*')
    }
}

/// The header without comments and preprocessor lines.
fn code(header: &str) -> String {
    let mut text = String::new();
    let mut rest = header;
    while let Some((before, after)) = rest.split_once("/*") {
        text += before;
        rest = after.split_once("*/").unwrap().1;
    }
    text += rest;
    let text = text.replace("\\\n", " ");
    text.lines().filter(|line| !line.trim_start().starts_with('#')).collect::<Vec<_>>().join("\n")
}

pub fn functions() -> Vec<Function> {
    functions_of(HEADER)
}

/// Those of another version of the header.
pub fn functions_of(header: &str) -> Vec<Function> {
    let code = code(header);
    let mut found = Vec::new();
    for statement in code.split(';') {
        let statement = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        let Some((head, tail)) = statement.split_once('(') else { continue };
        let head = head.rsplit(['}', '{']).next().unwrap().trim();
        let Some((returns, name)) = head.rsplit_once([' ', '*']) else { continue };
        if !name.starts_with("rrt_") || head.starts_with("typedef") {
            continue;
        }
        let list = tail.strip_suffix(')').unwrap();
        let parameter = |text: &str| {
            let at = text.rfind([' ', '*']).unwrap() + 1;
            let kind = text[..at].replace(" *", "*");
            Parameter { kind: kind.trim().to_owned(), name: text[at..].to_owned() }
        };
        let parameters = if list == "void" { Vec::new() } else { list.split(", ").map(parameter).collect() };
        found.push(Function { name: name.to_owned(), returns: returns.to_owned(), parameters });
    }
    assert!(found.len() > 80, "{}", found.len());
    found
}

/// Structs that begin with struct_size.
pub fn sized_structs() -> BTreeSet<String> {
    let code = code(HEADER);
    let mut names = BTreeSet::new();
    for part in code.split("typedef struct ").skip(1) {
        let Some((name, body)) = part.split_once('{') else { continue };
        if body.trim_start().starts_with("uint32_t struct_size") {
            names.insert(name.trim().to_owned());
        }
    }
    names
}

/// (macro, what it stands for) of every initialiser, on one line.
pub fn initialiser_bodies(header: &str) -> Vec<(String, String)> {
    let lines = header.replace("\\\n", " ");
    let defined = lines.lines().filter_map(|line| line.strip_prefix("#define ")?.split_once(' '));
    let initialisers = defined.filter(|(name, _)| name.starts_with("RRT_") && name.ends_with("_INIT"));
    initialisers.map(|(name, body)| (name.to_owned(), body.split_whitespace().collect::<Vec<_>>().join(" "))).collect()
}

/// (macro, struct) of every initialiser.
pub fn initialisers() -> Vec<(String, String)> {
    let macros = HEADER.lines().filter_map(|line| line.strip_prefix("#define ")?.split(' ').next());
    let of = |name: &str| {
        let stem = name.strip_prefix("RRT_")?.strip_suffix("_INIT")?.to_lowercase();
        Some((name.to_owned(), format!("rrt_{stem}")))
    };
    macros.filter_map(of).collect()
}

/// Names of every constant in the header's enums.
pub fn constants() -> Vec<String> {
    let code = code(HEADER);
    let bodies = code.split("enum {").skip(1).map(|part| part.split_once('}').unwrap().0);
    bodies.flat_map(|body| body.split(',')).filter_map(|c| Some(c.split_once('=')?.0.trim().to_owned())).collect()
}
