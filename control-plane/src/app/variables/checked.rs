//! What is checked of a variable before it is kept.

use latchkey_proto::reserved::is_reserved;
use latchkey_proto::v1::Reason;
use secrecy::{ExposeSecret, SecretString};

use super::{NewVariable, literal};
use crate::app::secrets::{ACCESS_KEY, SERIAL, TRIPLE};
use crate::error::{Error, Result};
use crate::store::record::variable::Category;
use crate::sts::check_serial;

pub(super) const LONGEST_VALUE: usize = 256 * 1024;
/// Linux passes name and value to a process in at most 128 KiB.
const LONGEST_IN_ENVIRONMENT: usize = 120 * 1024;
const LONGEST_OF_TRIPLE: usize = 2048;

/// Whether the triple may stand in a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Triple {
    Taken,
    Refused,
}

pub(super) fn checked(triple: Triple, mut variable: NewVariable) -> Result<NewVariable> {
    let bytes = variable.name.as_bytes();
    let first = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    let rest = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b == b'-';
    if !matches!(bytes.len(), 1..=128) || !first(bytes[0]) || !bytes.iter().all(rest) {
        let message = "a name has 1 to 128 letters, digits, `_` and `-`, and begins with a letter";
        return Err(Error::field("name", message));
    }
    if variable.value.expose_secret().len() > LONGEST_VALUE {
        return Err(Error::field("value", "a value has up to 256 KiB"));
    }
    if variable.category == Category::Terraform {
        if variable.hcl {
            literal::check(variable.value.expose_secret()).map_err(|problem| {
                let message = format!(
                    "it is no HCL value at {problem}. A value is a literal: a string, a number, \
                     true, false, null, or a list or object of these"
                );
                Error::field("value", message)
                    .with("line", problem.line.to_string())
                    .with("column", problem.column.to_string())
            })?;
        }
        return Ok(variable);
    }
    if variable.value.expose_secret().len() > LONGEST_IN_ENVIRONMENT {
        let message = "an environment variable has up to 120 KiB: Linux passes no more to a \
                       process; use a Terraform variable, or a file of the configuration";
        return Err(Error::field("value", message));
    }
    if variable.value.expose_secret().contains('\0') {
        return Err(Error::field("value", "an environment variable holds no NUL byte"));
    }
    if TRIPLE.contains(&variable.name.as_str()) && triple == Triple::Taken {
        return checked_triple(variable);
    }
    if is_reserved(&variable.name) {
        let message = format!(
            "{} is reserved: Latchkey gives terraform its credentials, state and settings itself. \
             {}",
            variable.name,
            if TRIPLE.contains(&variable.name.as_str()) {
                "The triple is set at organization or personal scope."
            } else {
                "Remove it; for files and registries use the runner's own configuration."
            }
        );
        return Err(Error::refused(Reason::VariableReserved, message).about("name"));
    }
    variable.hcl = false;
    Ok(variable)
}

fn checked_triple(mut variable: NewVariable) -> Result<NewVariable> {
    let value = SecretString::from(variable.value.expose_secret().trim());
    let text = value.expose_secret();
    if variable.name == SERIAL {
        check_serial(text).map_err(|problem| {
            let message = format!("the serial cannot be used: {problem}");
            Error::refused(Reason::SerialUnusable, message).about("value")
        })?;
    }
    if variable.name == ACCESS_KEY {
        if text.starts_with("ASIA") {
            let message = "this key is temporary (ASIA…), and AWS issues no session for it; give \
                           the long-term key (AKIA…) of an IAM user";
            return Err(Error::field("value", message));
        }
        let word = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !(16..=128).contains(&text.len()) || !word {
            return Err(Error::field("value", "it is not an AWS access key id (AKIA…)"));
        }
    }
    if text.is_empty() {
        return Err(Error::field("value", "it is empty"));
    }
    if text.len() > LONGEST_OF_TRIPLE {
        return Err(Error::field("value", "no key or serial is that long"));
    }
    variable.value = value;
    variable.sensitive = true;
    variable.hcl = false;
    Ok(variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str) -> NewVariable {
        NewVariable {
            name: name.into(),
            category: Category::Environment,
            value: value.into(),
            sensitive: false,
            hcl: false,
        }
    }

    #[track_caller]
    fn refused(triple: Triple, variable: NewVariable, reason: Reason) {
        assert_eq!(checked(triple, variable).unwrap_err().reason(), reason);
    }

    #[test]
    fn reserved_names_are_refused_and_ordinary_ones_are_not() {
        for name in [
            "AWS_PROFILE",
            "TF_WORKSPACE",
            "TF_CLI_ARGS_plan",
            "AWS_ENDPOINT_URL_STS",
            "AWS_ROLE_ARN",
            "TF_LOG_PATH",
            "LD_PRELOAD",
            "Path",
        ] {
            refused(Triple::Taken, variable(name, "x"), Reason::VariableReserved);
        }
        for name in ["TF_VAR_size", "HTTPS_PROXY", "AWS_REGION", "AWS_DEFAULT_REGION", "HOMEPAGE"] {
            assert!(checked(Triple::Taken, variable(name, "x")).is_ok(), "{name}");
        }
    }

    #[test]
    fn the_triple_is_checked_when_it_is_saved_and_always_sensitive() {
        let wide = Triple::Taken;
        let saved = checked(wide, variable(ACCESS_KEY, " AKIAQNZGKIQY56JQ7WML\n")).unwrap();
        assert!(saved.sensitive);
        assert_eq!(saved.value.expose_secret(), "AKIAQNZGKIQY56JQ7WML");
        refused(wide, variable(ACCESS_KEY, "ASIAQNZGKIQY56JQ7WML"), Reason::FieldInvalid);
        let user = "arn:aws:iam::123456789012:user/ada";
        refused(wide, variable(SERIAL, user), Reason::SerialUnusable);
        refused(
            Triple::Refused,
            variable(ACCESS_KEY, "AKIAQNZGKIQY56JQ7WML"),
            Reason::VariableReserved,
        );
    }
}
