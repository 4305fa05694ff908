//! Every rpc of the descriptor set against the audit chain: one that changes something leaves a
//! record of who did it, one that only looks changes nothing.
//!
//! Requests are made from the descriptors, as for [`super::tenants_tests`]. What takes more than
//! one request to come about is listed with the test that shows its record.

use std::collections::{BTreeMap, BTreeSet};

use prost_reflect::{DynamicMessage, ReflectMessage, Value};

use super::tenants_tests::filling::{methods, name, requests};
use super::tenants_tests::tenants::{OWN, Tenants};
use crate::app::PageRequest;
use crate::app::audit_trail::AuditFilter;
use crate::store::keys::Kind;

/// Called in this order, and each leaves a record of this action: looks at what is secret, then
/// changes, which have things done behind them.
const AUDITED: &[(&str, &str)] = &[
    ("QuarantineService/ReadQuarantined", "read_quarantined"),
    ("QuarantineService/CompareQuarantined", "compare_quarantined"),
    ("StateService/ReadStateVersion", "read_state"),
    ("StateService/DiffStateVersions", "diff_states"),
    ("AccountService/AcknowledgeBreakGlass", "acknowledge_break_glass"),
    ("AccountService/CreateUser", "create_user"),
    ("AccountService/CreateServiceToken", "create_service_token"),
    ("AccountService/RevokeServiceToken", "revoke_service_token"),
    ("OrganizationService/UpdateOrganization", "update_organization"),
    ("EnvironmentService/CreateEnvironment", "create_environment"),
    ("EnvironmentService/UpdateEnvironment", "update_environment"),
    ("EnvironmentService/LockEnvironment", "lock_environment"),
    ("EnvironmentService/UnlockEnvironment", "unlock_environment"),
    ("VariableService/SetVariable", "set_variable"),
    ("VariableService/DeleteVariable", "delete_variable"),
    ("RunService/QueueRun", "queue_run"),
    ("RunService/Cancel", "cancel_run"),
    ("QuarantineService/DropQuarantined", "drop_quarantined"),
    ("StateService/ForceUnlockState", "force_unlock_state"),
    ("NoticeService/SendTest", "test_notice"),
    ("NoticeService/CreateWebhook", "create_webhook"),
    ("NoticeService/DeleteWebhook", "delete_webhook"),
    ("PoolService/CreatePool", "create_pool"),
    ("PoolService/CreatePoolToken", "create_pool_token"),
    ("PoolService/DrainRunner", "drain_runner"),
    ("PoolService/ResumeRunner", "resume_runner"),
    ("PoolService/RevokeRunner", "revoke_runner"),
    ("AccountService/ResetUser", "reset_user"),
    ("MemberService/UpdateMember", "update_member"),
    ("MemberService/RemoveMember", "remove_member"),
];

/// They only look: no record changes.
const LOOKING: &[&str] = &[
    "AccountService/WhoAmI",
    "AccountService/ListServiceTokens",
    "SessionService/ListSessions",
    "MemberService/ListMembers",
    "OrganizationService/GetOrganization",
    "EnvironmentService/GetEnvironment",
    "EnvironmentService/ListEnvironments",
    "VariableService/ListVariables",
    "VariableService/GetEffectiveVariables",
    "RunService/GetRun",
    "RunService/ListRuns",
    "RunService/ReadLog",
    "PoolService/ListRunners",
    "PoolService/GetRunner",
    "QuarantineService/ListQuarantined",
    "StateService/ListStateVersions",
    "StateService/GetStateVersion",
    "AuditService/ListAuditRecords",
    "AuditService/ExportAudit",
    "AuditService/VerifyAudit",
    "NoticeService/ListWebhooks",
    "NoticeService/ListMailRecipients",
    "NoticeService/ListDeliveries",
];

/// What one request does not bring about, and where its record is shown; or why there is none.
const ELSEWHERE: &[(&str, &str)] = &[
    ("AccountService/Bootstrap", "an export of the command line begins with it"),
    ("SessionService/SignIn", "sessions::tests: sign_in, in each organization of the person"),
    ("SessionService/SignOut", "sessions::tests: sign_out"),
    ("SessionService/RevokeSession", "sessions::tests: revoke_session"),
    ("SessionService/SetPassword", "sessions::tests: set_password"),
    ("MemberService/AddMember", "members::tests: add_member"),
    ("EnvironmentService/UnfreezeEnvironment", "quarantine::tests: unfreeze_environment"),
    ("EnvironmentService/CheckEnvironment", "check_environment::tests: check_environment"),
    ("RunService/UploadConfiguration", "upload_configuration, by the commit of its claim"),
    ("RunService/RetryRun", "retry_run::tests: it queues, and queue_run is here"),
    ("RunService/WatchRun", "it looks, and does not end"),
    ("RunService/Authenticate", "authenticate_run::tests: submit_code, authenticate_run"),
    ("RunService/TopUp", "top_up::tests: submit_top_up, top_up"),
    ("RunService/Confirm", "every move of a run carries its record (App::write); so does this"),
    ("RunService/Discard", "as Confirm"),
    ("QuarantineService/AcceptState", "quarantine::tests: accept_state"),
    ("QuarantineService/SettleQuarantine", "quarantine::tests: each of its parts"),
    ("StateService/RollbackState", "states::tests: rollback_state"),
    ("StateService/ImportState", "states::tests: import_state"),
    ("NoticeService/SetMailRecipient", "notices::tests: set_mail_recipient"),
    ("NoticeService/DeleteMailRecipient", "notices::tests: delete_mail_recipient"),
    ("NoticeService/Redeliver", "notices::tests: redeliver_notice"),
    ("RunnerService/Enroll", "runners::tests: enroll_runner"),
    ("RunnerService/Lease", "each move of a run that a frame makes carries its record"),
    ("RunnerService/FetchArtifact", "it looks"),
    (
        "RunnerService/UploadArtifact",
        "artifacts: write_state, quarantine; a plan's parts by its end",
    ),
    ("RunnerService/AppendLog", "what terraform says is in the log, not in the chain"),
];

/// What of a request its field's name does not say.
fn fitting(rpc: &str, request: &mut DynamicMessage) {
    // The keys were cleared: nothing takes a code.
    if let Some(code) = request.descriptor().get_field_by_name("token_code") {
        request.clear_field(&code);
    }
    let mut set = |field: &str, value: Value| {
        let field = request.descriptor().get_field_by_name(field).unwrap();
        request.set_field(&field, value);
    };
    match rpc {
        "AccountService/CreateServiceToken" => set("access", Value::EnumNumber(2)),
        "EnvironmentService/CreateEnvironment" => set("environment", Value::String("new".into())),
        "EnvironmentService/UpdateEnvironment" => set("mfa_policy", Value::EnumNumber(2)),
        "StateService/ForceUnlockState" => set("environment", Value::String("spare".into())),
        "PoolService/CreatePool" => set("pool", Value::String("new".into())),
        _ => {}
    }
}

/// Every record but the chain's own.
async fn changeable(tenants: &Tenants) -> BTreeMap<Vec<u8>, crate::store::Version> {
    let mut records = tenants.records().await;
    records.retain(|key, _| {
        let kind = key.first().copied();
        ![Kind::Audit, Kind::AuditHead].iter().any(|audit| kind == Some(*audit as u8))
    });
    records
}

async fn actions(tenants: &Tenants) -> Vec<(String, String)> {
    let app = &tenants.fixture.app;
    let bob = app.caller(&tenants.owner).await.unwrap();
    let (mut actions, mut token) = (vec![], String::new());
    loop {
        let page = PageRequest { size: 200, token };
        let page = app.list_audit(&bob, OWN, AuditFilter::default(), page).await.unwrap();
        let drafts = page.items.into_iter().map(|record| record.draft);
        actions.extend(drafts.map(|draft| (draft.action, draft.actor)));
        match page.next {
            Some(next) => token = next,
            None => return actions,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_that_changes_something_leaves_a_record_and_the_others_change_nothing() {
    let all: BTreeMap<String, _> =
        methods().into_iter().map(|method| (name(&method), method)).collect();
    let audited = AUDITED.iter().map(|(rpc, _)| *rpc);
    let elsewhere = ELSEWHERE.iter().map(|(rpc, _)| *rpc);
    let listed: Vec<&str> = audited.chain(LOOKING.iter().copied()).chain(elsewhere).collect();
    let once: BTreeSet<&str> = listed.iter().copied().collect();
    assert_eq!(once.len(), listed.len(), "one is listed twice");
    assert_eq!(once, all.keys().map(String::as_str).collect(), "say of each what it leaves");

    let tenants = Tenants::new().await;
    let mut wrong = vec![];
    for rpc in LOOKING {
        let method = &all[*rpc];
        let before = tenants.records().await;
        let asked = requests(method, &tenants.own).into_iter().map(|aimed| aimed.request);
        let asked: Vec<_> = asked.chain([DynamicMessage::new(method.input())]).collect();
        let answer = tenants.call(method, &tenants.owner, &asked[0]).await;
        if let Err(status) = answer {
            wrong.push(format!("{rpc}: {status}"));
        }
        if before != tenants.records().await {
            wrong.push(format!("{rpc} changed something"));
        }
    }
    for (rpc, action) in AUDITED {
        let method = &all[*rpc];
        let (before, told) = (changeable(&tenants).await, actions(&tenants).await.len());
        let mut request = requests(method, &tenants.own).remove(0).request;
        fitting(rpc, &mut request);
        if let Err(status) = tenants.call(method, &tenants.owner, &request).await {
            wrong.push(format!("{rpc} {request}: {status}"));
            continue;
        }
        let new = actions(&tenants).await.split_off(told);
        if !new.contains(&((*action).to_owned(), "user bob".to_owned())) {
            wrong.push(format!("{rpc} left {new:?}"));
        }
        let looks = ["ReadQuarantined", "CompareQuarantined", "ReadState", "DiffState"];
        let changed = before != changeable(&tenants).await;
        if changed == looks.iter().any(|look| rpc.contains(look)) {
            wrong.push(format!("{rpc} changed something: {changed}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
