//! What was done by break-glass, for the owners who are told of it.

use latchkey_domain::id::GlassId;
use serde::{Deserialize, Serialize};

use super::{Millis, Text};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenGlass {
    pub id: Text<GlassId>,
    pub at: Millis,
    /// One sentence.
    pub what: String,
    pub reason: String,
}
