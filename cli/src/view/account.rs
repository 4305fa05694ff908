//! Callers, organizations and audit records, as programs and people see them.

use serde::Serialize;
use serde_json::Value;

use latchkey_proto::v1;

use crate::audit_export::Checked;
use crate::output::{fields, table};
use crate::words::{Word, human_time, time};

#[derive(Debug, Serialize)]
pub(crate) struct CallerView {
    address: String,
    user: Option<String>,
    service_token: Option<String>,
    /// What commands use when none is named.
    default_organization: Option<String>,
    memberships: Vec<MembershipView>,
    /// What the caller, an owner, has not acknowledged.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    broken_glass: Vec<BrokenGlassView>,
}

#[derive(Debug, Serialize)]
struct BrokenGlassView {
    organization: String,
    time: Option<String>,
    what: String,
    reason: String,
    #[serde(skip)]
    human_time: String,
}

#[derive(Debug, Serialize)]
struct MembershipView {
    organization: String,
    role: String,
}

impl CallerView {
    pub(crate) fn new(
        address: &str,
        default_organization: Option<&str>,
        caller: &v1::WhoAmIResponse,
    ) -> CallerView {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        CallerView {
            address: address.to_owned(),
            user: some(&caller.user),
            service_token: some(&caller.service_token),
            default_organization: default_organization.map(str::to_owned),
            memberships: caller
                .memberships
                .iter()
                .map(|membership| MembershipView {
                    organization: membership.organization.clone(),
                    role: membership.role().snake(),
                })
                .collect(),
            broken_glass: caller
                .broken_glass
                .iter()
                .map(|glass| BrokenGlassView {
                    organization: glass.organization.clone(),
                    time: time(glass.time.as_ref()),
                    what: glass.what.clone(),
                    reason: glass.reason.clone(),
                    human_time: human_time(glass.time.as_ref()),
                })
                .collect(),
        }
    }

    pub(crate) fn human(&self) -> String {
        let who = match (&self.user, &self.service_token) {
            (Some(user), _) => user.clone(),
            (None, Some(token)) => format!("service token {token}"),
            (None, None) => "nobody that is known".to_owned(),
        };
        let roles: Vec<String> = self
            .memberships
            .iter()
            .map(|membership| format!("{} in {}", membership.role, membership.organization))
            .collect();
        let mut text = format!("Signed in as {}\n", crate::log_view::clean(&who));
        text.push_str(&fields(&[
            ("at", self.address.clone()),
            ("roles", roles.join(", ")),
            ("organization", self.default_organization.clone().unwrap_or_default()),
        ]));
        for glass in &self.broken_glass {
            let BrokenGlassView { organization, what, reason, human_time, .. } = glass;
            text.push_str(&crate::log_view::clean(&format!(
                "BREAK-GLASS in {organization} at {human_time}: {what} ({reason})\n"
            )));
        }
        if !self.broken_glass.is_empty() {
            text.push_str("Somebody did this on the control plane's host, without a code.\n");
            text.push_str("`latchkey whoami --acknowledge` ends this message for you.\n");
        }
        text
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct OrganizationView {
    organization: String,
    aws_accounts: Vec<String>,
    external_id: Option<String>,
}

impl OrganizationView {
    pub(crate) fn new(organization: &v1::Organization) -> OrganizationView {
        OrganizationView {
            organization: organization.organization.clone(),
            aws_accounts: organization.aws_accounts.clone(),
            external_id: Some(organization.external_id.clone()).filter(|id| !id.is_empty()),
        }
    }

    pub(crate) fn human(&self) -> String {
        let accounts = match self.aws_accounts.join(", ") {
            none if none.is_empty() => "none: no code can be used".to_owned(),
            accounts => accounts,
        };
        let mut text = format!("Organization {}\n", crate::log_view::clean(&self.organization));
        let external_id = self.external_id.clone().unwrap_or_default();
        text.push_str(&fields(&[("aws accounts", accounts), ("external id", external_id)]));
        text
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct AuditListView {
    pub(crate) records: Vec<AuditRecordView>,
}

#[derive(Debug, Serialize)]
pub(crate) struct AuditRecordView {
    sequence: u64,
    time: Option<String>,
    actor: String,
    action: String,
    subject: String,
    details: Value,
    digest: String,
}

impl AuditRecordView {
    pub(crate) fn new(record: &v1::AuditRecord) -> AuditRecordView {
        AuditRecordView {
            sequence: record.sequence,
            time: time(record.time.as_ref()),
            actor: record.actor.clone(),
            action: record.action.clone(),
            subject: record.subject.clone(),
            details: serde_json::from_str(&record.details_json).unwrap_or(Value::Null),
            digest: record.digest.clone(),
        }
    }
}

impl AuditListView {
    pub(crate) fn human(&self) -> String {
        let details = |details: &Value| match details {
            Value::Null => String::new(),
            Value::Object(details) => details
                .iter()
                .map(|(name, value)| match value {
                    Value::String(text) => format!("{name}={text}"),
                    other => format!("{name}={other}"),
                })
                .collect::<Vec<_>>()
                .join(" "),
            other => other.to_string(),
        };
        let rows = self
            .records
            .iter()
            .map(|record| {
                vec![
                    record.sequence.to_string(),
                    record.time.clone().unwrap_or_default(),
                    record.actor.clone(),
                    record.action.clone(),
                    record.subject.clone(),
                    details(&record.details),
                ]
            })
            .collect();
        table(&["#", "TIME", "ACTOR", "ACTION", "SUBJECT", "DETAILS"], rows, "no records")
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct VerificationView {
    intact: bool,
    records: u64,
    head_digest: String,
    broken_at: Option<u64>,
    problem: Option<String>,
}

impl VerificationView {
    pub(crate) fn new(answer: &v1::VerifyAuditResponse) -> VerificationView {
        VerificationView {
            intact: answer.intact,
            records: answer.records,
            head_digest: answer.head_digest.clone(),
            broken_at: Some(answer.broken_at).filter(|_| !answer.intact),
            problem: Some(answer.problem.clone()).filter(|_| !answer.intact),
        }
    }

    pub(crate) fn human(&self) -> String {
        let mut text = match (self.intact, self.broken_at) {
            (true, _) => format!("Intact: {} records\n", self.records),
            (false, at) => format!("BROKEN at record {}\n", at.unwrap_or_default()),
        };
        text.push_str(&fields(&[
            ("head", self.head_digest.clone()),
            ("problem", self.problem.clone().unwrap_or_default()),
        ]));
        text
    }
}

/// What a check of an export, without a control plane, found.
#[derive(Debug, Serialize)]
pub(crate) struct ExportCheckView {
    intact: bool,
    /// Whose export it is; not told of one that does not hold.
    organization_id: Option<String>,
    first: Option<u64>,
    records: u64,
    head_digest: String,
    /// The record that has the digest that was noted elsewhere.
    noted_head_at: Option<u64>,
    broken_at: Option<u64>,
    problem: Option<String>,
}

impl ExportCheckView {
    pub(crate) fn confirmed(checked: &Checked) -> ExportCheckView {
        ExportCheckView {
            intact: true,
            organization_id: Some(checked.organization.clone()),
            first: Some(checked.first),
            records: checked.records,
            head_digest: checked.head.clone(),
            noted_head_at: checked.head_at,
            broken_at: None,
            problem: None,
        }
    }

    pub(crate) fn broken(sequence: u64, problem: String) -> ExportCheckView {
        ExportCheckView {
            intact: false,
            organization_id: None,
            first: None,
            records: 0,
            head_digest: String::new(),
            noted_head_at: None,
            broken_at: Some(sequence),
            problem: Some(problem),
        }
    }

    pub(crate) fn intact(&self) -> bool {
        self.intact
    }

    pub(crate) fn human(&self) -> String {
        let number = |number: Option<u64>| number.map(|at| at.to_string()).unwrap_or_default();
        let mut text = match self.intact {
            true => format!("Intact: {} records\n", self.records),
            false => format!("BROKEN at record {}\n", number(self.broken_at)),
        };
        let skipped = self.first.filter(|first| *first > 1);
        text.push_str(&fields(&[
            ("organization", self.organization_id.clone().unwrap_or_default()),
            ("from record", number(skipped)),
            ("head", self.head_digest.clone()),
            ("noted head", self.noted_head_at.map(|at| format!("record {at}")).unwrap_or_default()),
            ("problem", self.problem.clone().unwrap_or_default()),
        ]));
        text
    }
}

/// A token, in the one answer that shows it.
#[derive(Serialize)]
pub(crate) struct TokenView {
    pub(crate) name: String,
    pub(crate) token: String,
    pub(crate) expire_time: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_told_of_a_broken_glass_and_how_to_acknowledge_it() {
        let glass = v1::BrokenGlass {
            organization: "acme".into(),
            what: "environment web: the policy was set to never".into(),
            reason: "lost it\u{1b}[2J".into(),
            ..Default::default()
        };
        let caller = v1::WhoAmIResponse {
            user: "ada".into(),
            broken_glass: vec![glass],
            ..Default::default()
        };
        let view = CallerView::new("https://example.org", Some("acme"), &caller);
        let text = view.human();
        assert!(text.contains("BREAK-GLASS in acme"), "{text}");
        assert!(text.contains("the policy was set to never (lost it"), "{text}");
        assert!(text.contains("latchkey whoami --acknowledge"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["broken_glass"][0]["organization"], "acme");

        let told = v1::WhoAmIResponse { broken_glass: vec![], ..caller };
        let view = CallerView::new("https://example.org", Some("acme"), &told);
        assert!(!view.human().contains("BREAK-GLASS"));
    }
}
