//! stub
use crate::error::Result;
use crate::text::Tokenizer;
/// stub
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guide {
    /// a
    JsonSchema(String),
    /// a
    Regex(String),
    /// a
    Grammar(String),
}
pub(crate) struct GuideVocabulary;
impl GuideVocabulary {
    pub(crate) fn new(_: &Tokenizer, _: usize, _: &[u32]) -> Result<Self> {
        Ok(Self)
    }
    pub(crate) fn compile(&self, _: &Guide) -> Result<CompiledGuide> {
        Ok(CompiledGuide)
    }
}
#[derive(Clone)]
pub(crate) struct CompiledGuide;
impl CompiledGuide {
    pub(crate) fn start(&self) -> GuideState {
        GuideState
    }
}
#[derive(Clone)]
pub(crate) struct GuideState;
impl GuideState {
    pub(crate) fn mask(&mut self) -> Result<Vec<u32>> {
        Ok(vec![])
    }
    pub(crate) fn accept(&mut self, _: u32) -> Result<()> {
        Ok(())
    }
    pub(crate) fn is_finished(&self) -> bool {
        false
    }
    pub(crate) fn rollback(&mut self, _: usize) -> Result<()> {
        Ok(())
    }
}
