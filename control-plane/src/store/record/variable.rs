//! Variables as they are stored: every value sealed, sensitive or not.

use serde::{Deserialize, Serialize};

use super::{Millis, SealedBytes};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    Terraform,
    Environment,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Variable {
    pub name: String,
    pub category: Category,
    pub sensitive: bool,
    pub hcl: bool,
    pub value: SealedBytes,
    pub updated_at: Millis,
}

/// Returns the name under which a variable is kept: categories do not share names.
pub fn stored_name(category: Category, name: &str) -> String {
    match category {
        Category::Terraform => format!("t:{name}"),
        Category::Environment => format!("e:{name}"),
    }
}
