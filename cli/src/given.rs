//! Variables that are given for one run. What is no secret may stand on the command line; a secret
//! comes from a file or standard input, and never does.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use clap::Args;
use hcl::edit::Span;
use hcl::edit::structure::Structure;
use secrecy::zeroize::Zeroizing;
use secrecy::{ExposeSecret, SecretString};

use latchkey_proto::v1;
use latchkey_proto::v1::VariableCategory;

use crate::failure::Failure;
use crate::input::{Input, Question};

/// What the control plane takes together.
const LARGEST: u64 = 1 << 20;

#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Variables of this run alone")]
pub(crate) struct GivenArgs {
    /// A Terraform variable; this and the others may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    var: Vec<String>,
    /// A Terraform variable whose value is HCL: a list, an object, a number
    #[arg(long, value_name = "NAME=HCL")]
    var_hcl: Vec<String>,
    /// An environment variable of terraform
    #[arg(long, value_name = "NAME=VALUE")]
    env_var: Vec<String>,
    /// All assignments of a .tfvars file
    #[arg(long, value_name = "FILE")]
    var_file: Vec<String>,
    /// A Terraform variable that is masked wherever it would show: the content of FILE without
    /// its last line end, or with `-` a hidden prompt or the next line of standard input
    #[arg(long, value_name = "NAME=FILE")]
    secret_var: Vec<String>,
    /// The same for an environment variable of terraform
    #[arg(long, value_name = "NAME=FILE")]
    secret_env_var: Vec<String>,
}

impl GivenArgs {
    /// Reads what is in files and asks for the rest, secrets last and in the order given.
    pub(crate) async fn read(&self, input: &mut Input) -> Result<Vec<v1::RunVariable>, Failure> {
        let mut given = Vec::new();
        for file in &self.var_file {
            let text = read_file(Path::new(file), LARGEST).map_err(Failure::Input)?;
            given.extend(assignments(file, text.expose_secret())?);
        }
        for (arguments, environment, hcl) in
            [(&self.var, false, false), (&self.var_hcl, false, true), (&self.env_var, true, false)]
        {
            for argument in arguments {
                let (name, value) = parted(argument, "VALUE")?;
                given.push(variable(name, value, environment, hcl, false));
            }
        }
        for (arguments, environment) in [(&self.secret_var, false), (&self.secret_env_var, true)] {
            for argument in arguments {
                let (name, file) = parted(argument, "FILE")?;
                let value = if file == "-" {
                    input.answer(Question::Hidden(format!("Value of {name}: "))).await?
                } else {
                    read_file(Path::new(file), LARGEST).map_err(Failure::Input)?
                };
                given.push(variable(name, value.expose_secret(), environment, false, true));
            }
        }
        Ok(given)
    }
}

fn variable(
    name: &str,
    value: &str,
    environment: bool,
    hcl: bool,
    sensitive: bool,
) -> v1::RunVariable {
    let category =
        if environment { VariableCategory::Environment } else { VariableCategory::Terraform };
    v1::RunVariable {
        name: name.to_owned(),
        category: category.into(),
        value: value.to_owned(),
        hcl,
        sensitive,
    }
}

fn parted<'a>(argument: &'a str, what: &str) -> Result<(&'a str, &'a str), Failure> {
    argument.split_once('=').ok_or_else(|| {
        // The argument may be a value that was meant for elsewhere: it is not said again.
        Failure::Usage {
            message: "a variable was given without `=`".into(),
            hint: format!("write NAME={what}"),
        }
    })
}

fn read_file(path: &Path, limit: u64) -> io::Result<SecretString> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(path).map_err(named)?.take(limit + 1).read_to_end(&mut bytes).map_err(named)?;
    if bytes.len() as u64 > limit {
        return Err(named(io::Error::other("it is longer than 1 MiB")));
    }
    // The error of the standard library would show bytes.
    let text =
        std::str::from_utf8(&bytes).map_err(|_| named(io::Error::other("it is no UTF-8")))?;
    Ok(SecretString::from(text.strip_suffix('\n').unwrap_or(text)))
}

/// Takes a var-file apart. Values stay as they are written: the control plane judges them.
fn assignments(file: &str, text: &str) -> Result<Vec<v1::RunVariable>, Failure> {
    let bad = |message: String| Failure::Usage {
        message,
        hint: "a var-file holds assignments such as `name = \"value\"`".into(),
    };
    // With its line end, which a heredoc at the end needs.
    let text = Zeroizing::new(format!("{text}\n"));
    let body = hcl::edit::parser::parse_body(&text).map_err(|error| {
        let at = error.location();
        bad(format!("{file} is no HCL at line {}, column {}", at.line(), at.column()))
    })?;
    let mut found = Vec::new();
    for structure in &body {
        let Structure::Attribute(attribute) = structure else {
            return Err(bad(format!("{file} holds a block")));
        };
        let value = attribute.value.span().and_then(|span| text.get(span));
        let value = value.ok_or_else(|| bad(format!("{file} cannot be taken apart")))?;
        found.push(variable(attribute.key.as_str(), value, false, true, false));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::input::Stdin;

    fn shown(given: &[v1::RunVariable]) -> Vec<(&str, &str, bool, bool)> {
        let shown = |one: &v1::RunVariable| {
            (one.category() == VariableCategory::Environment, one.hcl, one.sensitive)
        };
        given
            .iter()
            .map(|one| (one.name.as_str(), one.value.as_str(), shown(one).1, shown(one).2))
            .collect()
    }

    #[test]
    fn a_var_file_is_taken_apart_as_it_is_written() {
        let text = "# first\na = \"x $${y} \\n\" # why\nb-c = {\n  d = [1, \"two\"]\n}\n\n\
                    e = <<EOT\nline\nEOT\n";
        let given = assignments("x.tfvars", text).unwrap();
        assert_eq!(
            shown(&given),
            [
                ("a", "\"x $${y} \\n\"", true, false),
                ("b-c", "{\n  d = [1, \"two\"]\n}", true, false),
                ("e", "<<EOT\nline\nEOT", true, false),
            ]
        );
        for bad in ["a = ", "block {\n}\n", "a"] {
            assert!(matches!(assignments("x", bad), Err(Failure::Usage { .. })), "{bad}");
        }
    }

    #[tokio::test]
    async fn secrets_come_from_files_and_lines_and_never_from_arguments() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "from\na file\n").unwrap();
        let given = GivenArgs {
            var: vec!["a=b=c".into()],
            secret_var: vec![format!("key={}", path.display()), "asked=-".into()],
            secret_env_var: vec!["TOKEN=-".into()],
            ..Default::default()
        };
        let mut input = Input::new(Stdin::Lines(Box::new(Cursor::new("one\ntwo\n"))));
        let read = given.read(&mut input).await.unwrap();
        assert_eq!(
            shown(&read),
            [
                ("a", "b=c", false, false),
                ("key", "from\na file", false, true),
                ("asked", "one", false, true),
                ("TOKEN", "two", false, true),
            ]
        );
        let given = GivenArgs { var: vec!["hunter2".into()], ..Default::default() };
        let error = given.read(&mut input).await.unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
