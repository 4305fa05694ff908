//! Every rpc, and who may call it. What is not listed is refused.
//!
//! The layer in front of the services enforces the first column: what proof of identity a call
//! needs to be looked at. The use case enforces the right within the organization, which is
//! only known once the request is read; it stands here so that the whole can be read, and a
//! test holds it against the descriptor set.

use super::Right;

/// Who may call an rpc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Whoever holds the one-time secret, password or pool token that the request carries.
    SecretInRequest,
    /// Any person or service token.
    Anyone,
    /// Who has this right in the organization that the request is about.
    Within(Right),
    /// A runner with a client certificate, for jobs that it holds.
    Runner,
}

const fn within(right: Right) -> Rule {
    Rule::Within(right)
}

/// (service, method, rule), without the package.
pub const RULES: &[(&str, &str, Rule)] = &[
    ("AccountService", "Bootstrap", Rule::SecretInRequest),
    ("AccountService", "WhoAmI", Rule::Anyone),
    ("AccountService", "AcknowledgeBreakGlass", within(Right::Own)),
    ("AccountService", "CreateUser", within(Right::Own)),
    ("AccountService", "CreateServiceToken", within(Right::Own)),
    ("AccountService", "ResetUser", within(Right::Own)),
    ("AccountService", "ListServiceTokens", within(Right::Own)),
    ("AccountService", "RevokeServiceToken", within(Right::Own)),
    ("SessionService", "SignIn", Rule::SecretInRequest),
    ("SessionService", "SignOut", Rule::Anyone),
    ("SessionService", "ListSessions", Rule::Anyone),
    ("SessionService", "RevokeSession", Rule::Anyone),
    ("SessionService", "SetPassword", Rule::Anyone),
    ("MemberService", "ListMembers", within(Right::Belong)),
    ("MemberService", "AddMember", within(Right::Own)),
    ("MemberService", "UpdateMember", within(Right::Own)),
    // Of others: owners.
    ("MemberService", "RemoveMember", within(Right::Belong)),
    ("OrganizationService", "GetOrganization", within(Right::Belong)),
    ("OrganizationService", "UpdateOrganization", within(Right::Own)),
    ("EnvironmentService", "CreateEnvironment", within(Right::Own)),
    ("EnvironmentService", "GetEnvironment", within(Right::Read)),
    ("EnvironmentService", "ListEnvironments", within(Right::Belong)),
    ("EnvironmentService", "UpdateEnvironment", within(Right::Own)),
    ("EnvironmentService", "UnfreezeEnvironment", within(Right::Own)),
    ("EnvironmentService", "LockEnvironment", within(Right::Administer)),
    ("EnvironmentService", "UnlockEnvironment", within(Right::Administer)),
    ("EnvironmentService", "CheckEnvironment", within(Right::Decide)),
    ("VariableService", "SetVariable", within(Right::Belong)),
    ("VariableService", "ListVariables", within(Right::Belong)),
    ("VariableService", "DeleteVariable", within(Right::Belong)),
    ("VariableService", "GetEffectiveVariables", within(Right::Read)),
    ("RunService", "UploadConfiguration", within(Right::Operate)),
    ("RunService", "QueueRun", within(Right::Operate)),
    ("RunService", "RetryRun", within(Right::Operate)),
    ("RunService", "GetRun", within(Right::Read)),
    ("RunService", "ListRuns", within(Right::Read)),
    ("RunService", "WatchRun", within(Right::Read)),
    ("RunService", "Authenticate", within(Right::Decide)),
    ("RunService", "TopUp", within(Right::Decide)),
    ("RunService", "Confirm", within(Right::Decide)),
    ("RunService", "Discard", within(Right::Decide)),
    ("RunService", "Cancel", within(Right::Operate)),
    ("RunService", "ReadLog", within(Right::Read)),
    ("PoolService", "CreatePool", within(Right::Own)),
    ("PoolService", "CreatePoolToken", within(Right::Own)),
    ("PoolService", "ListRunners", within(Right::Belong)),
    ("PoolService", "GetRunner", within(Right::Belong)),
    ("PoolService", "DrainRunner", within(Right::Own)),
    ("PoolService", "ResumeRunner", within(Right::Own)),
    ("PoolService", "RevokeRunner", within(Right::Own)),
    ("QuarantineService", "ListQuarantined", within(Right::Belong)),
    ("QuarantineService", "ReadQuarantined", within(Right::Own)),
    ("QuarantineService", "CompareQuarantined", within(Right::Own)),
    ("QuarantineService", "AcceptState", within(Right::Own)),
    ("QuarantineService", "DropQuarantined", within(Right::Own)),
    ("QuarantineService", "SettleQuarantine", within(Right::Own)),
    ("StateService", "ListStateVersions", within(Right::Read)),
    ("StateService", "GetStateVersion", within(Right::Read)),
    ("StateService", "ReadStateVersion", within(Right::Administer)),
    ("StateService", "DiffStateVersions", within(Right::Administer)),
    ("StateService", "RollbackState", within(Right::Administer)),
    ("StateService", "ImportState", within(Right::Administer)),
    ("StateService", "ForceUnlockState", within(Right::Administer)),
    ("AuditService", "ListAuditRecords", within(Right::Own)),
    ("AuditService", "ExportAudit", within(Right::Own)),
    ("AuditService", "VerifyAudit", within(Right::Own)),
    ("NoticeService", "CreateWebhook", within(Right::Own)),
    ("NoticeService", "ListWebhooks", within(Right::Own)),
    ("NoticeService", "DeleteWebhook", within(Right::Own)),
    ("NoticeService", "SetMailRecipient", within(Right::Own)),
    ("NoticeService", "ListMailRecipients", within(Right::Own)),
    ("NoticeService", "DeleteMailRecipient", within(Right::Own)),
    ("NoticeService", "ListDeliveries", within(Right::Own)),
    ("NoticeService", "Redeliver", within(Right::Own)),
    ("NoticeService", "SendTest", within(Right::Own)),
    ("RunnerService", "Enroll", Rule::SecretInRequest),
    ("RunnerService", "Lease", Rule::Runner),
    ("RunnerService", "FetchArtifact", Rule::Runner),
    ("RunnerService", "UploadArtifact", Rule::Runner),
    ("RunnerService", "AppendLog", Rule::Runner),
];

/// Finds the rule for an HTTP/2 path, `/latchkey.v1.Service/Method`.
pub fn rule_for(path: &str) -> Option<Rule> {
    let (service, method) = path.strip_prefix("/latchkey.v1.")?.split_once('/')?;
    RULES.iter().find(|(s, m, _)| *s == service && *m == method).map(|(_, _, rule)| *rule)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;

    use super::*;

    #[test]
    fn every_rpc_of_the_descriptor_set_has_exactly_one_rule() {
        let set = prost_types::FileDescriptorSet::decode(latchkey_proto::DESCRIPTOR_SET).unwrap();
        let mut described = BTreeSet::new();
        for file in set.file.iter().filter(|file| file.package() == "latchkey.v1") {
            for service in &file.service {
                for method in &service.method {
                    described.insert((service.name().to_owned(), method.name().to_owned()));
                }
            }
        }
        let ruled: Vec<_> =
            RULES.iter().map(|(s, m, _)| ((*s).to_owned(), (*m).to_owned())).collect();
        assert_eq!(ruled.len(), described.len(), "a rule stands twice or for nothing");
        assert_eq!(ruled.into_iter().collect::<BTreeSet<_>>(), described);
    }

    #[test]
    fn unknown_paths_have_no_rule() {
        assert_eq!(rule_for("/latchkey.v1.RunService/Explode"), None);
        assert_eq!(rule_for("/other.v1.RunService/GetRun"), None);
        assert_eq!(rule_for("/latchkey.v1.RunService/GetRun"), Some(Rule::Within(Right::Read)));
    }
}
