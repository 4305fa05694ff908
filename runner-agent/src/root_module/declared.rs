//! Which variables the root module declares.

use std::collections::BTreeSet;
use std::path::Path;

use hcl::{Body, Expression};
use serde_json::Value;

use super::{SourceFile, each, read};

/// Names of the root module's variables.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) names: BTreeSet<String>,
    /// Those that no plan keeps, so that its apply must be given them again.
    pub(crate) ephemeral: BTreeSet<String>,
}

/// Reads the declarations. A file that cannot be read declares nothing: terraform tells why.
pub(crate) fn declared(root: &Path) -> Declared {
    let mut found = Declared::default();
    for file in read(root).unwrap_or_default() {
        if file.name.ends_with(".json") {
            from_json(&file, &mut found);
        } else if let Ok(body) = hcl::parse(&file.text) {
            from_hcl(&body, &mut found);
        } else {
            guess(&file.text, &mut found);
        }
    }
    found
}

fn from_hcl(body: &Body, found: &mut Declared) {
    for block in body.blocks().filter(|block| block.identifier() == "variable") {
        let Some(name) = block.labels().first() else { continue };
        found.names.insert(name.as_str().to_owned());
        let mut attributes = block.body().attributes();
        if let Some(ephemeral) = attributes.find(|attribute| attribute.key() == "ephemeral")
            && *ephemeral.expr() != Expression::Bool(false)
        {
            found.ephemeral.insert(name.as_str().to_owned());
        }
    }
}

fn from_json(file: &SourceFile, found: &mut Declared) {
    let Ok(value) = serde_json::from_str::<Value>(&file.text) else { return };
    for variables in each(value.get("variable")) {
        for (name, bodies) in variables.as_object().into_iter().flatten() {
            found.names.insert(name.clone());
            let ephemeral = |body: &Value| {
                body.get("ephemeral").is_some_and(|ephemeral| *ephemeral != Value::Bool(false))
            };
            if each(Some(bodies)).any(ephemeral) {
                found.ephemeral.insert(name.clone());
            }
        }
    }
}

/// For a file our parser cannot read although terraform perhaps can: a declaration written in the
/// usual way is still seen, and may be ephemeral where the word stands in the file.
fn guess(text: &str, found: &mut Declared) {
    let may_be_ephemeral = text.contains("ephemeral");
    let text = text.replace('{', " { ").replace('"', " ");
    let words: Vec<&str> = text.split_whitespace().collect();
    for three in words.windows(3) {
        if let ["variable", name, "{"] = three {
            found.names.insert((*name).to_owned());
            if may_be_ephemeral {
                found.ephemeral.insert((*name).to_owned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn variables_are_found_in_either_syntax_and_in_what_does_not_parse() {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a.tf", "variable \"one\" {}\nvariable two {\n  ephemeral = true\n}\n"),
            ("b.tf", "variable \"three\" {\n  ephemeral = false\n}\nlocals {\n  a = 1\n}\n"),
            ("c.tf.json", r#"{"variable": {"four": {}, "five": [{"ephemeral": true}]}}"#),
            ("d.tf", "variable \"six\"{\n  type = string\n}\nresource {{{"),
            ("e_override.tf", "variable \"one\" {\n  ephemeral = true\n}\n"),
            ("f.tf", "variable \"seven\" {\n  ephemeral = true\n}\nresource {{{"),
        ] {
            fs::write(root.path().join(name), text).unwrap();
        }
        let found = declared(root.path());
        let names: Vec<&str> = found.names.iter().map(String::as_str).collect();
        assert_eq!(names, ["five", "four", "one", "seven", "six", "three", "two"]);
        let ephemeral: Vec<&str> = found.ephemeral.iter().map(String::as_str).collect();
        assert_eq!(ephemeral, ["five", "one", "seven", "two"]);
        assert_eq!(declared(Path::new("/nowhere")), Declared::default());
    }
}
