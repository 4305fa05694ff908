//! How far an apply has come, resource by resource: told by terraform's own lines in the
//! canonical log, whose form is <https://developer.hashicorp.com/terraform/internals/machine-readable-ui>.
//!
//! A fold of lines, so that whoever shows it needs the log alone and may stop and go on anywhere.

use std::collections::HashMap;

use serde::Deserialize;

/// More are not told apart: the log is of whatever a configuration prints.
const MOST: usize = 100_000;

/// Where one resource stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The plan changes it, and terraform has not begun.
    Waiting,
    UnderWay,
    Done,
    Failed,
}

/// One resource of an apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    pub(crate) address: String,
    /// What terraform does, or has done last: `create`, `update`, `delete`; of one that waits, what
    /// the plan says.
    pub(crate) action: String,
    pub(crate) step: Step,
    /// Seconds that terraform has told for this action.
    pub(crate) elapsed: u64,
}

/// All resources of an apply: those of the plan in its order, then others as they begin.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    resources: Vec<Resource>,
    by_address: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Line {
    r#type: String,
    hook: Hook,
}

#[derive(Deserialize)]
struct Hook {
    resource: Address,
    #[serde(default)]
    action: String,
    #[serde(default)]
    elapsed_seconds: f64,
}

#[derive(Deserialize)]
struct Address {
    addr: String,
}

impl Progress {
    /// Adds a resource that the plan changes.
    pub(crate) fn expect(&mut self, address: &str, action: &str) {
        self.entry(address, action);
    }

    /// Takes a line of the apply's log; most say nothing of a resource.
    pub(crate) fn take(&mut self, line: &str) {
        // Cheaper than to parse what cannot be one.
        if !line.contains("\"apply_") {
            return;
        }
        let Ok(line) = serde_json::from_str::<Line>(line) else { return };
        let step = match line.r#type.as_str() {
            "apply_start" | "apply_progress" => Step::UnderWay,
            "apply_complete" => Step::Done,
            "apply_errored" => Step::Failed,
            _ => return,
        };
        let Hook { resource, action, elapsed_seconds } = line.hook;
        if let Some(found) = self.entry(&resource.addr, &action) {
            found.step = step;
            found.action = action;
            // Saturates: it is never negative, nor near 2^64.
            found.elapsed = elapsed_seconds as u64;
        }
    }

    pub(crate) fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// Counts the resources that stand at a step.
    pub(crate) fn count(&self, step: Step) -> usize {
        self.resources.iter().filter(|resource| resource.step == step).count()
    }

    fn entry(&mut self, address: &str, action: &str) -> Option<&mut Resource> {
        if let Some(at) = self.by_address.get(address) {
            return self.resources.get_mut(*at);
        }
        if self.resources.len() >= MOST {
            return None;
        }
        self.by_address.insert(address.to_owned(), self.resources.len());
        let (address, action) = (address.to_owned(), action.to_owned());
        self.resources.push(Resource { address, action, step: Step::Waiting, elapsed: 0 });
        self.resources.last_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As terraform 1.11 writes it, shortened.
    fn line(kind: &str, address: &str, action: &str, elapsed: u64) -> String {
        format!(
            r#"{{"@level":"info","@message":"{address}: x","hook":{{"resource":{{"addr":"{address}","module":""}},"action":"{action}","elapsed_seconds":{elapsed}}},"type":"{kind}"}}"#
        )
    }

    #[test]
    fn each_resource_stands_where_its_last_line_says() {
        let mut progress = Progress::default();
        for (address, action) in [("a.one", "replace"), ("a.two", "create"), ("a.three", "update")]
        {
            progress.expect(address, action);
        }
        for line in [
            line("apply_start", "a.one", "delete", 0),
            line("apply_complete", "a.one", "delete", 2),
            line("apply_start", "a.one", "create", 0),
            line("apply_start", "a.two", "create", 0),
            line("apply_progress", "a.two", "create", 10),
            line("apply_errored", "a.two", "create", 11),
            line("apply_progress", "a.one", "create", 20),
            line("apply_start", "a.deposed", "delete", 0),
            line("provision_progress", "a.three", "", 0),
            r#"{"@message":"\"apply_start\"","type":"version"}"#.to_owned(),
            r#"{"type":"apply_start"}"#.to_owned(),
            "\"apply_".to_owned(),
        ] {
            progress.take(&line);
        }
        let found: Vec<_> = progress
            .resources()
            .iter()
            .map(|one| (one.address.as_str(), one.action.as_str(), one.step, one.elapsed))
            .collect();
        assert_eq!(
            found,
            [
                ("a.one", "create", Step::UnderWay, 20),
                ("a.two", "create", Step::Failed, 11),
                ("a.three", "update", Step::Waiting, 0),
                ("a.deposed", "delete", Step::UnderWay, 0),
            ]
        );
        assert_eq!(progress.count(Step::UnderWay), 2);
    }

    #[test]
    fn what_a_log_can_make_us_keep_is_bounded() {
        let mut progress = Progress::default();
        for number in 0..MOST + 5 {
            progress.expect(&format!("a.b[{number}]"), "create");
        }
        progress.take(&line("apply_start", "a.more", "create", 0));
        assert_eq!(progress.resources().len(), MOST);
    }
}
