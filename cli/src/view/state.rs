//! State versions, locks and differences, as programs and people see them.

use serde::Serialize;

use latchkey_proto::v1;

use crate::log_view::clean;
use crate::output::{fields, table};
use crate::words::{Word, human_time, time};

#[derive(Debug, Serialize)]
pub(crate) struct StateVersionView {
    version: u64,
    serial: u64,
    lineage: String,
    current: bool,
    origin: String,
    user: Option<String>,
    run_id: Option<String>,
    from_version: Option<u64>,
    create_time: Option<String>,
    size: Option<u64>,
    digest: String,
    #[serde(skip)]
    human_time: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct StateLockView {
    pub(crate) lock_id: String,
    user: String,
    operation: String,
    workstation: String,
    info: Option<String>,
    engine_version: Option<String>,
    create_time: Option<String>,
    #[serde(skip)]
    human_time: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct StateListView {
    pub(crate) lock: Option<StateLockView>,
    pub(crate) versions: Vec<StateVersionView>,
}

#[derive(Debug, Serialize)]
pub(crate) struct StateDiffView {
    changes: Vec<ChangeView>,
    truncated: bool,
    added: u32,
    changed: u32,
    removed: u32,
}

#[derive(Debug, Serialize)]
struct ChangeView {
    address: String,
    action: String,
    attributes: Vec<AttributeView>,
    truncated: bool,
}

#[derive(Debug, Serialize)]
struct AttributeView {
    path: String,
    /// JSON, shortened when long; absent when the value is absent or sensitive.
    before: Option<String>,
    after: Option<String>,
    sensitive: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct VersionsDiffView {
    pub(crate) before: StateVersionView,
    pub(crate) after: StateVersionView,
    #[serde(flatten)]
    pub(crate) diff: StateDiffView,
}

/// How terraform reaches a state. It has no `Debug`, since it may hold the token in clear.
#[derive(Serialize)]
pub(crate) struct BackendView {
    pub(crate) address: String,
    pub(crate) ca_certificate_pem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

impl StateVersionView {
    pub(crate) fn new(version: &v1::StateVersion) -> StateVersionView {
        StateVersionView {
            version: version.version,
            serial: version.serial,
            lineage: version.lineage.clone(),
            current: version.current,
            origin: version.origin().snake(),
            user: some(&version.user),
            run_id: some(&version.run_id),
            from_version: Some(version.from_version).filter(|from| *from > 0),
            create_time: time(version.create_time.as_ref()),
            size: Some(version.size).filter(|size| *size > 0),
            digest: version.digest.clone(),
            human_time: human_time(version.create_time.as_ref()),
        }
    }

    /// Says who made it and how.
    fn made(&self) -> String {
        let run = self.run_id.as_ref().map(|run| format!("run {run}"));
        let user = self.user.as_ref().map(|user| format!("by {user}"));
        let what = match (self.origin.as_str(), self.from_version) {
            ("run", _) => None,
            ("rollback", Some(from)) => Some(format!("rollback to {from}")),
            (origin, _) => Some(origin.to_owned()),
        };
        [what, run, user].into_iter().flatten().collect::<Vec<_>>().join(" ")
    }

    pub(crate) fn human(&self) -> String {
        let current = if self.current { ", current" } else { "" };
        let mut text = format!("Version {}{current}\n", self.version);
        text.push_str(&fields(&[
            ("serial", self.serial.to_string()),
            ("lineage", self.lineage.clone()),
            ("made", self.made()),
            ("at", self.human_time.clone()),
            ("size", self.size.map(|size| format!("{size} bytes")).unwrap_or_default()),
            ("digest", self.digest.clone()),
        ]));
        text
    }
}

impl StateLockView {
    pub(crate) fn new(lock: &v1::StateLock) -> StateLockView {
        StateLockView {
            lock_id: lock.lock_id.clone(),
            user: lock.user.clone(),
            operation: lock.operation.clone(),
            workstation: lock.workstation.clone(),
            info: some(&lock.info),
            engine_version: some(&lock.engine_version),
            create_time: time(lock.create_time.as_ref()),
            human_time: human_time(lock.create_time.as_ref()),
        }
    }

    pub(crate) fn human(&self) -> String {
        clean(&format!(
            "Locked by {} from {}, {}, since {}, lock {}\n",
            self.user, self.workstation, self.operation, self.human_time, self.lock_id
        ))
    }
}

impl StateListView {
    pub(crate) fn human(&self) -> String {
        let rows = self
            .versions
            .iter()
            .map(|version| {
                vec![
                    version.version.to_string(),
                    version.serial.to_string(),
                    version.made(),
                    version.human_time.clone(),
                    version.size.map(|size| size.to_string()).unwrap_or_default(),
                    version.digest.chars().take(12).collect(),
                ]
            })
            .collect();
        let names = ["VERSION", "SERIAL", "MADE", "AT", "SIZE", "DIGEST"];
        let table = table(&names, rows, "no state yet");
        self.lock.as_ref().map(StateLockView::human).unwrap_or_default() + &table
    }
}

impl StateDiffView {
    pub(crate) fn new(diff: &v1::StateDiff) -> StateDiffView {
        let attribute = |attribute: &v1::AttributeChange| AttributeView {
            path: attribute.path.clone(),
            before: some(&attribute.before_json),
            after: some(&attribute.after_json),
            sensitive: attribute.sensitive,
        };
        let change = |change: &v1::StateChange| ChangeView {
            address: change.address.clone(),
            action: change.action().snake(),
            attributes: change.attributes.iter().map(attribute).collect(),
            truncated: change.truncated,
        };
        StateDiffView {
            changes: diff.changes.iter().map(change).collect(),
            truncated: diff.truncated,
            added: diff.added,
            changed: diff.changed,
            removed: diff.removed,
        }
    }

    pub(crate) fn human(&self) -> String {
        let mut text = String::new();
        for ChangeView { address, action, attributes, truncated } in &self.changes {
            let sign = match action.as_str() {
                "added" => '+',
                "removed" => '-',
                _ => '~',
            };
            text.push_str(&clean(&format!("{sign} {address}\n")));
            for attribute in attributes {
                let name = if attribute.path.is_empty() { "value" } else { &attribute.path };
                let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "(none)".into());
                let values = match (attribute.sensitive, action.as_str()) {
                    (true, _) => "(sensitive)".to_owned(),
                    (false, "added") => side(&attribute.after),
                    (false, "removed") => side(&attribute.before),
                    (false, _) => {
                        format!("{} -> {}", side(&attribute.before), side(&attribute.after))
                    }
                };
                text.push_str(&clean(&format!("    {name}: {values}\n")));
            }
            if *truncated {
                text.push_str("    ... and more\n");
            }
        }
        if self.truncated {
            text.push_str("... and more; `latchkey state download` has all\n");
        }
        let StateDiffView { added, changed, removed, .. } = self;
        text.push_str(&match added + changed + removed {
            0 => "No resource and no output differs\n".to_owned(),
            _ => format!("{added} added, {changed} changed, {removed} removed\n"),
        });
        text
    }
}

impl VersionsDiffView {
    pub(crate) fn human(&self) -> String {
        let VersionsDiffView { before, after, diff } = self;
        format!(
            "From version {} (serial {}) to version {} (serial {})\n{}",
            before.version,
            before.serial,
            after.version,
            after.serial,
            diff.human()
        )
    }
}

impl BackendView {
    /// Lines for a shell.
    pub(crate) fn human(&self) -> String {
        let mut text =
            String::from("# The configuration says: terraform { backend \"http\" {} }\n");
        let mut export = |name: &str, value: &str| {
            text.push_str(&format!("export {name}='{}'\n", value.replace('\'', r"'\''")));
        };
        for name in ["TF_HTTP_ADDRESS", "TF_HTTP_LOCK_ADDRESS", "TF_HTTP_UNLOCK_ADDRESS"] {
            export(name, &self.address);
        }
        export("TF_HTTP_USERNAME", "token");
        if let Some(pem) = &self.ca_certificate_pem {
            export("TF_HTTP_CLIENT_CA_CERTIFICATE_PEM", pem.trim_end());
        }
        if let Some(token) = &self.token {
            export("TF_HTTP_PASSWORD", token);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_reads_line_by_line_and_shows_nothing_sensitive() {
        let attribute = |path: &str, before: &str, after: &str, sensitive| v1::AttributeChange {
            path: path.into(),
            before_json: before.into(),
            after_json: after.into(),
            sensitive,
        };
        let change = |address: &str, action: v1::StateChangeAction, attributes| v1::StateChange {
            address: address.into(),
            action: action.into(),
            attributes,
            truncated: false,
        };
        let diff = v1::StateDiff {
            changes: vec![
                change(
                    "t.a\u{1b}[2J",
                    v1::StateChangeAction::Changed,
                    vec![attribute("x", "1", "", false), attribute("y", "", "", true)],
                ),
                change("t.b", v1::StateChangeAction::Added, vec![attribute("x", "", "2", false)]),
                change(
                    "output.o",
                    v1::StateChangeAction::Removed,
                    vec![attribute("", "3", "", false)],
                ),
            ],
            truncated: false,
            added: 1,
            changed: 1,
            removed: 1,
        };
        assert_eq!(
            StateDiffView::new(&diff).human(),
            "~ t.a\n    x: 1 -> (none)\n    y: (sensitive)\n+ t.b\n    x: 2\n- output.o\n    \
             value: 3\n1 added, 1 changed, 1 removed\n"
        );
        let none = StateDiffView::new(&v1::StateDiff::default()).human();
        assert_eq!(none, "No resource and no output differs\n");
    }

    #[test]
    fn the_lines_for_a_shell_are_quoted() {
        let view = BackendView {
            address: "https://x/state/acme/web".into(),
            ca_certificate_pem: Some("-----BEGIN\nit's-----\n".into()),
            token: None,
        };
        let text = view.human();
        assert!(
            text.contains("export TF_HTTP_LOCK_ADDRESS='https://x/state/acme/web'\n"),
            "{text}"
        );
        assert!(text.contains("PEM='-----BEGIN\nit'\\''s-----'\n"), "{text}");
        assert!(!text.contains("PASSWORD"), "{text}");
    }
}
