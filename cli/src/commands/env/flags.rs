//! The settings of `env create` and `env set` that come in groups: a group that is named at all
//! replaces the whole of what was set.

use clap::{Args, ValueEnum};

use latchkey_proto::v1;

use crate::words::parse_duration;

/// What an apply must be approved by, beside the policy's level; owners only.
#[derive(Debug, Args)]
pub(super) struct Approval {
    /// Who approves an apply must not be who queued the run; a run that a service token queued may
    /// be approved by any person; owners only
    #[arg(long, value_name = "true|false")]
    pub(super) second_person: Option<bool>,
    /// Demand a code for applies that destroy or replace anything; owners only
    #[arg(long)]
    code_if_destructive: bool,
    /// Demand a code for applies that change resources of this type, such as `aws_iam_*`; may be
    /// repeated; owners only
    #[arg(long, value_name = "TYPE")]
    code_if_type: Vec<String>,
    /// Demand a code for applies that change more than N resources; owners only
    #[arg(long, value_name = "N")]
    code_if_more_than: Option<u32>,
    /// Demand codes by the policy's level alone again
    #[arg(long, conflicts_with_all = ["code_if_destructive", "code_if_type", "code_if_more_than"])]
    no_code_if: bool,
}

impl Approval {
    pub(super) fn rule(&self) -> Option<v1::PlanRule> {
        let rule = v1::PlanRule {
            destructive: self.code_if_destructive,
            resource_types: self.code_if_type.clone(),
            more_than: self.code_if_more_than,
        };
        (self.no_code_if || rule != v1::PlanRule::default()).then_some(rule)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ByCode {
    /// A session: later calls carry MFA
    Session,
    /// The phase's role: narrowed and attributable; later calls carry no MFA
    Role,
}

/// The modes that assume a role; owners only.
#[derive(Debug, Args)]
pub(super) struct RoleFlags {
    /// What a code buys; owners only
    #[arg(long, value_enum)]
    code_credentials: Option<ByCode>,
    /// Role that plans assume in the modes `role`; with any of the role flags, both phases' roles
    /// are replaced; owners only
    #[arg(long, value_name = "ARN")]
    plan_role: Option<String>,
    /// Session policy of the plan's role, as JSON
    #[arg(long, value_name = "JSON", requires = "plan_role")]
    plan_policy: Option<String>,
    /// Managed policy that narrows the plan's role; may be repeated
    #[arg(long, value_name = "ARN", requires = "plan_role")]
    plan_policy_arn: Vec<String>,
    /// Role that applies assume in the modes `role`; owners only
    #[arg(long, value_name = "ARN")]
    apply_role: Option<String>,
    /// Session policy of the apply's role, as JSON
    #[arg(long, value_name = "JSON", requires = "apply_role")]
    apply_policy: Option<String>,
    /// Managed policy that narrows the apply's role; may be repeated
    #[arg(long, value_name = "ARN", requires = "apply_role")]
    apply_policy_arn: Vec<String>,
    /// Take both roles away
    #[arg(long, conflicts_with_all = ["plan_role", "apply_role"])]
    no_roles: bool,
}

impl RoleFlags {
    pub(super) fn code_credentials(&self) -> Option<i32> {
        self.code_credentials.map(|mode| match mode {
            ByCode::Session => v1::CodeCredentials::Session.into(),
            ByCode::Role => v1::CodeCredentials::Role.into(),
        })
    }

    pub(super) fn roles(&self) -> Option<v1::Roles> {
        if !self.no_roles && self.plan_role.is_none() && self.apply_role.is_none() {
            return None;
        }
        let role = |arn: &Option<String>, policy: &Option<String>, arns: &Vec<String>| {
            arn.clone().map(|arn| v1::RoleSettings {
                arn,
                policy_json: policy.clone().unwrap_or_default(),
                policy_arns: arns.clone(),
            })
        };
        Some(v1::Roles {
            plan: role(&self.plan_role, &self.plan_policy, &self.plan_policy_arn),
            apply: role(&self.apply_role, &self.apply_policy, &self.apply_policy_arn),
        })
    }
}

/// Limits of time.
#[derive(Debug, Args)]
pub(super) struct LimitFlags {
    /// Cancel a run that waits longer for a person; with any of the limits, all are replaced
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    limit_person: Option<prost_types::Duration>,
    /// Ask a plan to stop that runs longer
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    limit_plan: Option<prost_types::Duration>,
    /// Ask an apply to stop that runs longer
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    limit_apply: Option<prost_types::Duration>,
    /// Take all limits away
    #[arg(long, conflicts_with_all = ["limit_person", "limit_plan", "limit_apply"])]
    no_limits: bool,
}

impl LimitFlags {
    pub(super) fn limits(&self) -> Option<v1::Limits> {
        let limits = v1::Limits {
            person: self.limit_person,
            plan: self.limit_plan,
            apply: self.limit_apply,
        };
        (self.no_limits || limits != v1::Limits::default()).then_some(limits)
    }
}
