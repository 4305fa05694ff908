//! Variables as they are stored: every value sealed, sensitive or not.

use latchkey_domain::id::Digest;
use latchkey_domain::run;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::environment::is_default;
use super::{Millis, SealedBytes, Text};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Terraform,
    Environment,
}

impl From<run::Category> for Category {
    fn from(category: run::Category) -> Self {
        match category {
            run::Category::Terraform => Category::Terraform,
            run::Category::Environment => Category::Environment,
        }
    }
}

impl From<Category> for run::Category {
    fn from(category: Category) -> Self {
        match category {
            Category::Terraform => run::Category::Terraform,
            Category::Environment => run::Category::Environment,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variable {
    pub name: String,
    pub category: Category,
    pub sensitive: bool,
    pub hcl: bool,
    /// Empty when it is stored.
    pub value: SealedBytes,
    /// Where a large value is: records are small.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored: Option<StoredValue>,
    pub updated_at: Millis,
    /// Of a run: whether it is the organization's or the environment's, kept as its plan had it,
    /// rather than given or personal.
    #[serde(default, skip_serializing_if = "is_default")]
    pub of_plan: bool,
}

/// A value in a blob: behind the bytes of its id, so that the blob's name tells nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredValue {
    pub digest: Text<Digest>,
    pub id: Text<Uuid>,
    pub length: u64,
}

/// Returns the name under which a variable is kept: categories do not share names.
pub fn stored_name(category: Category, name: &str) -> String {
    match category {
        Category::Terraform => format!("t:{name}"),
        Category::Environment => format!("e:{name}"),
    }
}
