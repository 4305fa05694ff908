//! What the doctor found, as programs and people see it.

use serde::Serialize;

use latchkey_proto::v1;

use crate::log_view::clean;
use crate::words::Word;

#[derive(Debug, Serialize)]
pub(crate) struct CheckView {
    steps: Vec<StepView>,
}

#[derive(Debug, Serialize)]
struct StepView {
    name: String,
    outcome: String,
    sentence: String,
    remedy: Option<String>,
}

impl CheckView {
    pub(crate) fn new(steps: &[v1::CheckStep]) -> CheckView {
        let steps = steps
            .iter()
            .map(|step| StepView {
                name: step.name.clone(),
                outcome: step.outcome().snake(),
                sentence: step.sentence.clone(),
                remedy: Some(step.remedy.clone()).filter(|remedy| !remedy.is_empty()),
            })
            .collect();
        CheckView { steps }
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.steps.iter().any(|step| step.outcome == "failed")
    }

    /// The mark tells by its shape, the word beside it by words.
    pub(crate) fn human(&self) -> String {
        let mut text = String::new();
        for step in &self.steps {
            let mark = match step.outcome.as_str() {
                "ok" => "[+]",
                "failed" => "[x]",
                _ => "[ ]",
            };
            let (name, outcome) = (step.name.replace('_', " "), &step.outcome);
            text.push_str(&format!("{mark} {name}: {outcome}: {}\n", step.sentence));
            if let Some(remedy) = &step.remedy {
                text.push_str(&format!("      fix: {remedy}\n"));
            }
        }
        let failed = self.steps.iter().filter(|step| step.outcome == "failed").count();
        text.push_str(&match failed {
            0 => "Nothing is wrong with what was tried\n".to_owned(),
            1 => "1 thing is to be fixed\n".to_owned(),
            count => format!("{count} things are to be fixed\n"),
        });
        clean(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_its_remedy() {
        let step = |name: &str, outcome: v1::CheckOutcome, remedy: &str| v1::CheckStep {
            name: name.into(),
            outcome: outcome.into(),
            sentence: "so it is".into(),
            remedy: remedy.into(),
        };
        let view = CheckView::new(&[
            step("triple", v1::CheckOutcome::Ok, ""),
            step("apply_role_duration", v1::CheckOutcome::Failed, "raise it"),
            step("device", v1::CheckOutcome::Skipped, ""),
        ]);
        assert!(view.has_failed());
        assert_eq!(
            view.human(),
            "[+] triple: ok: so it is\n[x] apply role duration: failed: so it is\n      fix: raise \
             it\n[ ] device: skipped: so it is\n1 thing is to be fixed\n"
        );
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["steps"][1]["outcome"], "failed");
        assert_eq!(json["steps"][0]["remedy"], serde_json::Value::Null);
    }
}
