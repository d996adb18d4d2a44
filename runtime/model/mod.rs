//! From config.json to a list of kernel calls: config → [`ModelSpec`] → [`Plan`].
//!
//! A spec is data. A new architecture is a new row in [`families`] with its tensor names, not a new forward function.

mod config;
mod families;
mod plan;
mod rope;
mod spec;

pub use config::parse_config;
pub use families::FAMILIES;
pub(crate) use families::carries_no_weight;
pub use plan::{Buf, MatrixId, Op, Plan, Projection, VectorId};
pub(crate) use plan::{EMBEDDING, LM_HEAD};
pub use rope::{Rope, RopeKind};
pub use spec::{AttentionBias, Head, ModelSpec};

pub use crate::runtime::read_spec;
