//! What the root module says of itself: its variables, and where the state lives.
//!
//! Latchkey keeps the state unless the configuration names a backend of its own: then one
//! override file with the `http` backend is added, which terraform merges over `backend` and
//! `cloud` blocks alike; nothing of the user's is rewritten. What would silently defeat that is
//! refused with the reason:
//!
//! - another override file that sets a backend: it could win over ours (measured);
//! - `terraform.workspace` under `cloud` or `remote`: it would become `default` (measured);
//! - a `local` backend on a relative path: the state would vanish with the job's directory.

mod declared;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hcl::{Block, Body, Expression};
use serde_json::Value;

pub(crate) use self::declared::{Declared, declared};
use crate::engine::is_tofu;

const OVERRIDE_STEM: &str = "zz_latchkey_override";
pub(crate) const OVERRIDE_FILE: &str = "zz_latchkey_override.tf";
/// OpenTofu reads this one instead of the other, whoever wrote it.
const OVERRIDE_FILE_OF_TOFU: &str = "zz_latchkey_override.tofu";
const OVERRIDE: &str = "terraform {\n  backend \"http\" {}\n}\n";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("find any .tf file in the working directory {0:?}")]
    Empty(PathBuf),
    #[error(
        "accept {file}: an override file must not set a backend, since Latchkey adds its own; \
         remove the block"
    )]
    OverriddenBackend { file: String },
    #[error(
        "accept {file}: it uses terraform.workspace under `cloud` or `remote`; here it would \
         always be `default`: use a variable instead"
    )]
    WorkspaceName { file: String },
    #[error(
        "accept {file}: its `local` backend has a relative path, so the state would be lost \
         with the job; remove the backend block and Latchkey keeps the state"
    )]
    LocalBackend { file: String },
}

/// Where the state lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StateHome {
    /// With Latchkey, through the override file.
    Latchkey,
    /// In the configuration's own backend, named here.
    Own(String),
}

/// Judges the root module and adds the override file where it belongs.
pub(crate) fn prepare(root: &Path, engine: &Path) -> Result<StateHome, Error> {
    let home = judge(&read(root)?)?;
    if home == StateHome::Latchkey {
        let of_tofu = is_tofu(engine).then_some(OVERRIDE_FILE_OF_TOFU);
        for name in [Some(OVERRIDE_FILE), of_tofu].into_iter().flatten() {
            let path = root.join(name);
            fs::write(&path, OVERRIDE).map_err(|source| Error::Read { path, source })?;
        }
    }
    Ok(home)
}

/// Tells whether the override stands in for a `cloud` or `remote` block: the state that such a
/// block names is not used.
pub(crate) fn stands_in(root: &Path) -> bool {
    let Ok(files) = read(root) else { return false };
    let theirs = files.iter().filter(|file| !file.name.starts_with(OVERRIDE_STEM));
    theirs.flat_map(backends).any(|backend| match backend {
        Backend::Cloud => true,
        Backend::Named(kind, _) => kind == "remote",
    })
}

struct SourceFile {
    name: String,
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Backend {
    Cloud,
    /// Kind, and for `local` whether its path is relative.
    Named(String, Persistence),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Persistence {
    Lasting,
    WithTheDirectory,
}

fn read(root: &Path) -> Result<Vec<SourceFile>, Error> {
    let failed = |path: &Path, source| Error::Read { path: path.to_owned(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(root).map_err(|source| failed(root, source))? {
        let path = entry.map_err(|source| failed(root, source))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let read = [".tf", ".tf.json", ".tofu", ".tofu.json"].iter().any(|e| name.ends_with(e));
        // Terraform skips editors' leftovers too.
        let leftover = name.starts_with('.') || name.ends_with('~') || name.starts_with('#');
        if read && !leftover && path.is_file() {
            let bytes = fs::read(&path).map_err(|source| failed(&path, source))?;
            files.push(SourceFile { name, text: String::from_utf8_lossy(&bytes).into_owned() });
        }
    }
    if files.is_empty() {
        return Err(Error::Empty(root.file_name().map(PathBuf::from).unwrap_or_default()));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn judge(files: &[SourceFile]) -> Result<StateHome, Error> {
    let mut found = None;
    for file in files {
        // What does not parse is left for terraform to explain, with line and column.
        for backend in backends(file) {
            if is_override(&file.name) {
                return Err(Error::OverriddenBackend { file: file.name.clone() });
            }
            found.get_or_insert((file.name.clone(), backend));
        }
    }
    match found {
        None => Ok(StateHome::Latchkey),
        Some((file, Backend::Named(_, Persistence::WithTheDirectory))) => {
            Err(Error::LocalBackend { file })
        }
        Some((_, Backend::Named(kind, Persistence::Lasting))) if kind != "remote" => {
            Ok(StateHome::Own(kind))
        }
        Some((_, Backend::Cloud | Backend::Named(..))) => {
            match files.iter().find(|file| names_workspace(&file.text)) {
                Some(file) => Err(Error::WorkspaceName { file: file.name.clone() }),
                None => Ok(StateHome::Latchkey),
            }
        }
    }
}

fn is_override(name: &str) -> bool {
    let stem = name.trim_end_matches(".json").trim_end_matches(".tf").trim_end_matches(".tofu");
    stem == "override" || stem.ends_with("_override")
}

fn backends(file: &SourceFile) -> Vec<Backend> {
    if file.name.ends_with(".json") {
        return serde_json::from_str(&file.text).map(|v| json_backends(&v)).unwrap_or_default();
    }
    let Ok(body) = hcl::parse(&file.text) else {
        return guessed_backends(&file.text);
    };
    let terraform = body.blocks().filter(|block| block.identifier() == "terraform");
    terraform.flat_map(|block| block.body().blocks()).filter_map(hcl_backend).collect()
}

fn hcl_backend(block: &Block) -> Option<Backend> {
    match block.identifier() {
        "cloud" => Some(Backend::Cloud),
        "backend" => {
            let kind = block.labels().first()?.as_str().to_owned();
            let path = attribute(block.body(), "path");
            let persistence = persistence(&kind, path.as_deref());
            Some(Backend::Named(kind, persistence))
        }
        _ => None,
    }
}

fn attribute(body: &Body, name: &str) -> Option<String> {
    match body.attributes().find(|attribute| attribute.key() == name)?.expr() {
        Expression::String(text) => Some(text.clone()),
        _ => None,
    }
}

fn json_backends(value: &Value) -> Vec<Backend> {
    let mut found = Vec::new();
    for terraform in each(value.get("terraform")) {
        if terraform.get("cloud").is_some() {
            found.push(Backend::Cloud);
        }
        for backend in each(terraform.get("backend")) {
            for (kind, settings) in backend.as_object().into_iter().flatten() {
                let settings = each(Some(settings)).next();
                let path = settings.and_then(|s| s.get("path")).and_then(Value::as_str);
                found.push(Backend::Named(kind.clone(), persistence(kind, path)));
            }
        }
    }
    found
}

/// Blocks in JSON may stand alone or in an array.
fn each(value: Option<&Value>) -> Box<dyn Iterator<Item = &Value> + '_> {
    match value {
        Some(Value::Array(many)) => Box::new(many.iter()),
        one => Box::new(one.into_iter()),
    }
}

fn persistence(kind: &str, path: Option<&str>) -> Persistence {
    let lasting = kind != "local" || path.is_some_and(|path| Path::new(path).is_absolute());
    if lasting { Persistence::Lasting } else { Persistence::WithTheDirectory }
}

/// For a file our parser cannot read although terraform perhaps can: a backend block written in
/// the usual way is still seen.
fn guessed_backends(text: &str) -> Vec<Backend> {
    let mut found = Vec::new();
    let text = without_comments(text).replace('{', " { ").replace('"', " \" ");
    let words: Vec<&str> = text.split_whitespace().collect();
    for at in 0..words.len() {
        match &words[at..] {
            ["backend", "\"", kind, "\"", "{", ..] | ["backend", kind, "{", ..] => {
                found.push(Backend::Named((*kind).to_owned(), Persistence::Lasting));
            }
            ["cloud", "{", ..] => found.push(Backend::Cloud),
            _ => {}
        }
    }
    found
}

fn names_workspace(text: &str) -> bool {
    let text = without_comments(text);
    let mut rest = text.as_str();
    while let Some(at) = rest.find("terraform") {
        let before = rest[..at].chars().next_back();
        let after: String = rest[at + "terraform".len()..]
            .chars()
            .filter(|c| !c.is_whitespace())
            .take(".workspace".len() + 1)
            .collect();
        let own_word = !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '.');
        let ends = |c: char| !(c.is_alphanumeric() || c == '_');
        if own_word && after.strip_prefix(".workspace").is_some_and(|r| r.chars().all(ends)) {
            return true;
        }
        rest = &rest[at + "terraform".len()..];
    }
    false
}

/// Drops whole-line comments: enough not to refuse somebody's note.
fn without_comments(text: &str) -> String {
    let comment = |line: &&str| {
        let line = line.trim_start();
        !(line.starts_with('#') || line.starts_with("//"))
    };
    text.lines().filter(comment).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(files: &[(&str, &str)], expect: Result<StateHome, &str>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let found = prepare(dir.path(), Path::new("/bin/terraform"));
        assert_eq!(
            dir.path().join(OVERRIDE_FILE).exists(),
            matches!(found, Ok(StateHome::Latchkey)),
            "{files:?}"
        );
        match (found, expect) {
            (Ok(found), Ok(expect)) => assert_eq!(found, expect, "{files:?}"),
            (Err(found), Err(expect)) => {
                assert!(found.to_string().contains(expect), "{found} lacks {expect}");
            }
            (found, expect) => panic!("{files:?}: {found:?} is not {expect:?}"),
        }
    }

    #[test]
    fn the_state_lives_with_latchkey_unless_a_backend_is_named() {
        use StateHome::{Latchkey, Own};
        let own = |kind: &str| Ok(Own(kind.into()));
        check(&[("main.tf", "resource \"a\" \"b\" {}")], Ok(Latchkey));
        check(&[("main.tf", "terraform {\n required_version = \">= 1\"\n}")], Ok(Latchkey));
        check(&[("m.tf", "terraform {\n cloud {\n organization = \"x\"\n}\n}")], Ok(Latchkey));
        check(&[("m.tf", "terraform {\n backend \"remote\" {}\n}")], Ok(Latchkey));
        check(&[("m.tf", "terraform {\n backend \"s3\" {\n bucket = \"b\"\n}\n}")], own("s3"));
        check(&[("m.tf.json", r#"{"terraform":{"backend":{"gcs":{}}}}"#)], own("gcs"));
        check(&[("m.tf.json", r#"{"terraform":[{"backend":[{"s3":{}}]}]}"#)], own("s3"));
        check(&[("m.tf.json", r#"{"terraform":{"cloud":{}}}"#)], Ok(Latchkey));
        let absolute = "terraform {\n backend \"local\" {\n path = \"/srv/x\"\n}\n}";
        check(&[("m.tf", absolute)], own("local"));
        check(&[("a.tf", ""), ("b.tf", "terraform {\n backend \"s3\" {}\n}")], own("s3"));
        // Terraform explains broken files better than we could.
        check(&[("m.tf", "resource {{{")], Ok(Latchkey));
        for backend in ["backend \"s3\" {", "backend \"s3\"{", "backend s3{"] {
            check(&[("m.tf", &format!("terraform {{\n  {backend}\n"))], own("s3"));
            check(&[("m.tf", &format!("terraform {{ {backend}"))], own("s3"));
        }
    }

    #[test]
    fn the_override_of_tofu_cannot_be_taken_by_a_file_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("main.tf"), "").unwrap();
        fs::write(dir.path().join(OVERRIDE_FILE_OF_TOFU), "# nothing").unwrap();
        prepare(dir.path(), Path::new("/usr/bin/tofu")).unwrap();
        for name in [OVERRIDE_FILE, OVERRIDE_FILE_OF_TOFU] {
            assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), OVERRIDE);
        }
    }

    #[test]
    fn what_would_defeat_the_override_is_refused_with_the_reason() {
        let backend = "terraform {\n backend \"s3\" {}\n}";
        for name in ["override.tf", "zzz_override.tf"] {
            check(&[("m.tf", ""), (name, backend)], Err("must not set a backend"));
        }
        let json = r#"{"terraform":{"backend":{"s3":{}}}}"#;
        for name in ["override.tf.json", "x_override.tf.json"] {
            check(&[("m.tf", ""), (name, json)], Err("must not set a backend"));
        }
        check(&[("x_override.tf", "terraform {\n cloud {}\n}")], Err("must not set a backend"));
        let local = "terraform {\n backend \"local\" {}\n}";
        check(&[("m.tf", local)], Err("state would be lost"));
        let cloud = "terraform {\n cloud {}\n}";
        let uses = "locals {\n a = terraform.workspace\n}";
        check(&[("c.tf", cloud), ("l.tf", uses)], Err("terraform.workspace"));
        check(
            &[("l.tf", "locals {\n a = \"x-${terraform.workspace}\"\n}"), ("c.tf", cloud)],
            Err("l.tf"),
        );
        check(&[], Err("find any .tf file"));
    }

    #[test]
    fn harmless_neighbours_are_not_refused() {
        let cloud = "terraform {\n cloud {}\n}";
        check(&[("c.tf", cloud), ("l.tf", "# terraform.workspace")], Ok(StateHome::Latchkey));
        check(
            &[("c.tf", cloud), ("l.tf", "locals {\n a = terraform.workspaces\n}")],
            Ok(StateHome::Latchkey),
        );
        check(&[("l.tf", "locals {\n a = terraform.workspace\n}")], Ok(StateHome::Latchkey));
        check(
            &[("x_override.tf", "resource \"a\" \"b\" {}"), ("m.tf", "")],
            Ok(StateHome::Latchkey),
        );
    }

    #[test]
    fn a_cloud_block_that_is_stood_in_for_is_told() {
        for (text, expect) in [
            ("terraform {\n  cloud {\n    organization = \"x\"\n  }\n}\n", true),
            ("terraform {\n  backend \"remote\" {}\n}\n", true),
            ("resource \"terraform_data\" \"one\" {}\n", false),
        ] {
            let root = tempfile::tempdir().unwrap();
            fs::write(root.path().join("main.tf"), text).unwrap();
            prepare(root.path(), Path::new("terraform")).unwrap();
            assert_eq!(stands_in(root.path()), expect, "{text}");
        }
    }
}
