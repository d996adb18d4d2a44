//! stub
use super::Tokenizer;
use crate::error::Result;
use std::sync::Arc;
#[derive(Clone)]
pub(crate) struct TextStream(Arc<Tokenizer>, Arc<[String]>, Vec<u32>);
impl TextStream {
    pub(crate) fn new(t: Arc<Tokenizer>, stops: Arc<[String]>) -> Self {
        TextStream(t, stops, vec![])
    }
    pub(crate) fn push(&mut self, id: u32) -> Result<bool> {
        self.2.push(id);
        let t = self.0.decode_sampled(&self.2)?;
        Ok(self.1.iter().any(|s| t.contains(s.as_str())))
    }
    pub(crate) fn take(&mut self) -> String {
        String::new()
    }
    pub(crate) fn finish(&mut self) -> (String, String) {
        let mut t = self.0.decode_sampled(&self.2).unwrap_or_default();
        if let Some(c) = self.1.iter().filter_map(|s| t.find(s.as_str())).min() {
            t.truncate(c)
        }
        (t.clone(), t)
    }
}
