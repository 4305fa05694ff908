//! Terraform variables as a var-file that goes in by standard input: never by disk or
//! environment.
//!
//! HCL rather than JSON, because a value may be an HCL expression. `$` and `%` are written as
//! escapes, so that no string can begin an interpolation whatever stands before it.
//!
//! A plan is not given sensitive variables that the root module does not declare: terraform would
//! name each in a warning, and the names of personal variables are nobody else's to know. An apply
//! is given the ephemeral ones alone: a saved plan holds the values of all others. Terraform before
//! 1.10 refuses to be given any beside a plan, and later ones refuse another value than the plan's.

use std::fmt::Write;

use hcl::Structure;
use latchkey_proto::v1;
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::environment::UserVariable;
use crate::root_module::Declared;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("pass on the variable {0:?}: its name is no identifier")]
    Name(String),
    #[error("pass on the variable {0:?}: its value is no single HCL expression")]
    Expression(String),
    #[error("pass on the variable {0:?}: it holds a zero byte or its name an equals sign")]
    Environment(String),
}

/// The job's variables, sorted by what they are for.
#[derive(Debug, Default)]
pub(super) struct Variables {
    pub(super) environment: Vec<UserVariable>,
    terraform: Vec<Assignment>,
    /// What the log must not show.
    pub(super) sensitive: Vec<SecretString>,
}

/// A Terraform variable as a line, or lines, of the var-file.
#[derive(Debug)]
struct Assignment {
    name: String,
    text: SecretString,
    sensitive: bool,
}

impl Variables {
    /// Answers the var-file of a plan; `None` when nothing is to be given.
    pub(super) fn of_plan(&self, declared: &Declared) -> Option<SecretString> {
        self.file(|one| !one.sensitive || declared.names.contains(&one.name))
    }

    /// Answers the var-file of an apply of a saved plan; `None` when nothing is to be given.
    pub(super) fn of_apply(&self, declared: &Declared) -> Option<SecretString> {
        self.file(|one| declared.ephemeral.contains(&one.name))
    }

    fn file(&self, is_given: impl Fn(&Assignment) -> bool) -> Option<SecretString> {
        let mut file = Zeroizing::new(String::new());
        for one in self.terraform.iter().filter(|one| is_given(one)) {
            file.push_str(one.text.expose_secret());
        }
        (!file.is_empty()).then(|| SecretString::from(file.as_str()))
    }
}

pub(super) fn sort(variables: Vec<v1::JobVariable>) -> Result<Variables, Error> {
    let mut sorted = Variables::default();
    for variable in variables {
        let v1::JobVariable { name, value, environment, hcl, sensitive } = variable;
        let value = SecretString::from(value);
        if sensitive {
            sorted.sensitive.push(value.clone());
            if hcl {
                sorted.sensitive.extend(inner_strings(value.expose_secret()));
            } else if !environment {
                // A diagnostic quotes the var-file.
                let written = literal(value.expose_secret());
                sorted.sensitive.push(SecretString::from(&written[1..written.len() - 1]));
            }
        }
        if environment {
            let bad_name = name.is_empty() || name.contains(['=', '\0']);
            if bad_name || value.expose_secret().contains('\0') {
                return Err(Error::Environment(name));
            }
            sorted.environment.push(UserVariable { name, value });
        } else {
            let text = assign(&name, value.expose_secret(), hcl)?;
            let text = SecretString::from(text.as_str());
            sorted.terraform.push(Assignment { name, text, sensitive });
        }
    }
    Ok(sorted)
}

fn assign(name: &str, value: &str, hcl: bool) -> Result<Zeroizing<String>, Error> {
    if !is_identifier(name) {
        return Err(Error::Name(name.to_owned()));
    }
    if !hcl {
        return Ok(Zeroizing::new(format!("{name} = {}\n", *literal(value))));
    }
    // In parentheses an expression may have several lines; on lines of its own a comment or a
    // heredoc in it ends before the closing one.
    let assignment = Zeroizing::new(format!("{name} = (\n{value}\n)\n"));
    let body = hcl::parse(&assignment).map_err(|_| Error::Expression(name.to_owned()))?;
    let mut structures = body.iter();
    match (structures.next(), structures.next()) {
        (Some(Structure::Attribute(attribute)), None) if attribute.key() == name => Ok(assignment),
        _ => Err(Error::Expression(name.to_owned())),
    }
}

fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

fn literal(value: &str) -> Zeroizing<String> {
    let mut out = Zeroizing::new(String::with_capacity(value.len() + 2));
    out.push('"');
    for c in value.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == '$' || c == '%' || c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Answers the strings inside an HCL value: the log shows them one by one, not as a whole.
fn inner_strings(value: &str) -> Vec<SecretString> {
    let mut found = Vec::new();
    let Ok(body) = hcl::parse(&format!("x = (\n{value}\n)\n")) else { return found };
    for attribute in body.attributes() {
        strings(attribute.expr(), &mut found);
    }
    found
}

fn strings(expression: &hcl::Expression, found: &mut Vec<SecretString>) {
    match expression {
        hcl::Expression::String(text) => found.push(SecretString::from(text.as_str())),
        hcl::Expression::Number(number) => found.push(SecretString::from(number.to_string())),
        hcl::Expression::Array(items) => items.iter().for_each(|item| strings(item, found)),
        hcl::Expression::Object(object) => {
            object.values().for_each(|value| strings(value, found));
        }
        hcl::Expression::Parenthesis(inner) => strings(inner, found),
        hcl::Expression::TemplateExpr(template) => {
            // As it stands there, which a diagnostic quotes, and as terraform understands it.
            let text = match &**template {
                hcl::TemplateExpr::QuotedString(text) => text,
                hcl::TemplateExpr::Heredoc(heredoc) => &heredoc.template,
            };
            let meant = Zeroizing::new(text.replace("$${", "${").replace("%%{", "%{"));
            found.push(SecretString::from(text.as_str()));
            found.push(SecretString::from(meant.as_str()));
        }
        // What must be evaluated is not known here.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str, value: &str, hcl: bool) -> v1::JobVariable {
        v1::JobVariable { name: name.into(), value: value.into(), hcl, ..Default::default() }
    }

    fn file(variables: Vec<v1::JobVariable>) -> Result<String, Error> {
        let file = sort(variables)?.of_plan(&Declared::default());
        Ok(file.map(|file| file.expose_secret().to_owned()).unwrap_or_default())
    }

    #[test]
    fn strings_are_escaped_and_expressions_are_kept() {
        for (value, hcl, expect) in [
            ("plain", false, "x = \"plain\"\n"),
            ("a\"b\\c\nd", false, "x = \"a\\\"b\\\\c\\nd\"\n"),
            ("${a} %{b} $${c}", false, "x = \"\\u0024{a} \\u0025{b} \\u0024\\u0024{c}\"\n"),
            ("[1, 2]", true, "x = (\n[1, 2]\n)\n"),
        ] {
            assert_eq!(file(vec![variable("x", value, hcl)]).unwrap(), expect);
        }
    }

    #[test]
    fn a_value_cannot_set_another_variable() {
        for value in ["1)\nother = (2", "1\n)\nother = (\n2", "1) other = (2", "", "{", "a b"] {
            let found = file(vec![variable("x", value, true)]);
            assert!(matches!(found, Err(Error::Expression(_))), "{value:?}: {found:?}");
        }
        for name in ["a b", "1a", "", "a=1\nb", "\"a\""] {
            assert!(matches!(file(vec![variable(name, "1", false)]), Err(Error::Name(_))));
        }
    }

    fn sensitive(name: &str, value: &str, hcl: bool) -> v1::JobVariable {
        v1::JobVariable { sensitive: true, ..variable(name, value, hcl) }
    }

    #[test]
    fn a_sensitive_value_is_known_as_the_var_file_writes_it() {
        for (value, hcl, written) in [
            ("q%canary$1", false, "q\\u0025canary\\u00241"),
            ("{ a = \"x-$${canary}\" }", true, "x-${canary}"),
            ("<<-E\n  x-$${canary}\n  E\n", true, "x-${canary}"),
        ] {
            let known = sort(vec![sensitive("x", value, hcl)]).unwrap().sensitive;
            let known: Vec<&str> = known.iter().map(|secret| secret.expose_secret()).collect();
            assert!(known.iter().any(|known| known.trim() == written), "{value}: {known:?}");
        }
    }

    #[test]
    fn a_plan_is_given_no_sensitive_one_that_is_not_declared_and_an_apply_the_ephemeral_ones() {
        let names = ["declared", "token"].map(str::to_owned).into();
        let declared = Declared { names, ephemeral: ["token".to_owned()].into() };
        let variables = sort(vec![
            variable("typo", "1", false),
            variable("declared", "2", false),
            sensitive("elsewhere", "3", false),
            sensitive("token", "4", false),
        ]);
        let variables = variables.unwrap();
        let file = |file: Option<SecretString>| file.unwrap().expose_secret().to_owned();
        let plan = file(variables.of_plan(&declared));
        assert_eq!(plan, "typo = \"1\"\ndeclared = \"2\"\ntoken = \"4\"\n");
        assert_eq!(file(variables.of_apply(&declared)), "token = \"4\"\n");
        assert!(variables.of_apply(&Declared::default()).is_none());
    }

    #[test]
    fn strings_inside_a_sensitive_expression_are_known() {
        let sensitive = sensitive("x", "{ a = [\"canary-1\"], b = \"canary-2\" }", true);
        let known = sort(vec![sensitive]).unwrap().sensitive;
        let known: Vec<&str> = known.iter().map(|secret| secret.expose_secret()).collect();
        assert!(known.contains(&"canary-1") && known.contains(&"canary-2"), "{known:?}");
    }
}
