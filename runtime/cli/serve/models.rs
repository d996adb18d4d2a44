//! What is served, by name.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rewardrt::model::Head;
use rewardrt::{Error, ErrorKind, Model, Result, Rule, Runtime};

use super::activation::Activations;
use super::error::{ApiError, ApiResult};
use super::respond::now;
use crate::args::{Loading, RewardArg};

/// `NAME=PATH`, or PATH, whose last part is the name then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedModel {
    pub name: String,
    pub path: PathBuf,
}

impl FromStr for NamedModel {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) => (name.to_owned(), PathBuf::from(path)),
            None => {
                let path = PathBuf::from(text);
                let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
                (name.unwrap_or_default(), path)
            }
        };
        match name.is_empty() || path.as_os_str().is_empty() {
            true => Err("it must be NAME=PATH, or a PATH that ends in a name".into()),
            false => Ok(NamedModel { name, path }),
        }
    }
}

/// What a served model is for.
pub enum Role {
    /// It samples.
    Policy,
    /// It scores.
    Reward { rule: Rule, activations: Activations },
}

/// A model under a name.
pub struct Served {
    pub name: String,
    pub model: Model,
    pub role: Role,
    pub created: u64,
    /// As it was given, and where that leads.
    paths: [PathBuf; 2],
}

/// All of them, in the order of the command line.
pub struct Models(Vec<Arc<Served>>);

impl Models {
    /// Loads everything; a folder that has several names is loaded once.
    ///
    /// # Errors
    /// `Argument` for a name that is given twice, a policy without a language-model head, a rule that does not fit; and
    /// what loading returns.
    pub fn load(runtime: &Runtime, loading: &Loading, policies: &[NamedModel], rewards: &[RewardArg]) -> Result<Self> {
        let mut models = Models(Vec::new());
        for NamedModel { name, path } in policies {
            let model = models.open(runtime, loading, name, path)?;
            if !matches!(model.spec().head, Head::LanguageModel { .. }) {
                let what = &model.spec().architecture;
                let message = format!("--model {name}: {what} has no language-model head; serve it by --reward");
                return Err(Error::new(ErrorKind::Argument, message));
            }
            models.add(name, path, model, Role::Policy)?;
        }
        for reward in rewards {
            let (name, path, rule) = (&reward.name(), &reward.model, &reward.rule);
            let model = models.open(runtime, loading, name, path)?;
            let rule = match rule {
                Some(rule) => rule.clone(),
                None => Rule::for_model(model.spec()).map_err(|e| e.at(format!("--reward {name}")))?,
            };
            // One token is enough to learn whether the rule fits.
            let probe = rewardrt::ScoreRequest {
                sequences: vec![vec![0]],
                rule: Some(rule.clone()),
                ..rewardrt::ScoreRequest::default()
            };
            model.score(&probe).and_then(rewardrt::Job::wait).map_err(|e| e.at(format!("--reward {name}")))?;
            let activations = Activations::of(&rule, model.spec(), path)?;
            models.add(name, path, model, Role::Reward { rule, activations })?;
        }
        Ok(models)
    }

    fn open(&self, runtime: &Runtime, loading: &Loading, name: &str, path: &Path) -> Result<Model> {
        if name.is_empty() {
            return Err(Error::new(ErrorKind::Argument, format!("{} needs a name: NAME=PATH", path.display())));
        }
        if self.0.iter().any(|m| m.name == name) {
            return Err(Error::new(ErrorKind::Argument, format!("the name {name:?} is given to two models")));
        }
        let real = canonical(path)?;
        match self.0.iter().find(|m| m.paths[1] == real) {
            Some(same) => Ok(same.model.clone()),
            None => loading.load(runtime, path, loading.kv_tokens),
        }
    }

    fn add(&mut self, name: &str, path: &Path, model: Model, role: Role) -> Result<()> {
        let paths = [path.into(), canonical(path)?];
        self.0.push(Arc::new(Served { name: name.into(), model, role, created: now(), paths }));
        Ok(())
    }

    /// Each model once, by the first of its names.
    pub fn distinct(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.0
            .iter()
            .enumerate()
            .filter(|(i, m)| !self.0[..*i].iter().any(|other| other.model.is(&m.model)))
            .map(|(_, m)| m)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Served>> {
        self.0.iter()
    }

    /// The policy of this name or path; the first one where none is named.
    pub fn policy(&self, name: Option<&str>) -> ApiResult<Arc<Served>> {
        self.find(name, "a --model", |m| matches!(m.role, Role::Policy))
    }

    /// The same for a reward model.
    pub fn reward(&self, name: Option<&str>) -> ApiResult<Arc<Served>> {
        self.find(name, "a --reward", |m| matches!(m.role, Role::Reward { .. }))
    }

    fn find(&self, name: Option<&str>, what: &str, fits: impl Fn(&Served) -> bool) -> ApiResult<Arc<Served>> {
        // Trainers name a model by the path that they were given themselves.
        let is = |m: &Served, name: &str| m.name == name || m.paths.iter().any(|path| path == Path::new(name));
        let found = self.0.iter().find(|m| fits(m) && name.is_none_or(|name| is(m, name)));
        found.cloned().ok_or_else(|| {
            let names: Vec<&str> = self.0.iter().filter(|m| fits(m)).map(|m| m.name.as_str()).collect();
            ApiError::no_model(match name {
                Some(name) => format!("the model {name:?} is not served as {what}; these are: {}", names.join(", ")),
                None => format!("this server has no model for it: start it with {what}"),
            })
        })
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|e| Error::new(ErrorKind::NotFound, format!("{}: {e}", path.display())))
}
