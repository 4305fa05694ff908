//! Application errors to gRPC status: the only file that makes one.

use std::collections::HashMap;

use latchkey_proto::ERROR_DOMAIN;
use latchkey_proto::v1::Reason;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::Error;

/// The kind of status that a reason has; plain HTTP has it from here, too.
pub(crate) const fn code(reason: Reason) -> Code {
    match reason {
        Reason::FieldInvalid
        | Reason::VariableReserved
        | Reason::ArchiveRefused
        | Reason::DigestMismatch => Code::InvalidArgument,
        Reason::IdentityRequired | Reason::PoolTokenRejected | Reason::SignInRejected => {
            Code::Unauthenticated
        }
        Reason::NotAllowed | Reason::PersonRequired | Reason::SecondPersonRequired => {
            Code::PermissionDenied
        }
        Reason::NotFound => Code::NotFound,
        Reason::NameTaken => Code::AlreadyExists,
        Reason::ChangedMeanwhile => Code::Aborted,
        Reason::StoreUnavailable | Reason::AwsUnreachable => Code::Unavailable,
        Reason::LimitReached | Reason::DeviceBusy | Reason::SignInThrottled => {
            Code::ResourceExhausted
        }
        Reason::MfaRequired
        | Reason::NotAwaitingCode
        | Reason::WrongState
        | Reason::LastOwner
        | Reason::UserShared
        | Reason::PlanChanged
        | Reason::CancelGrace
        | Reason::HistoryLost
        | Reason::TripleIncomplete
        | Reason::SerialUnusable
        | Reason::AccountNotListed
        | Reason::CodeUsed
        | Reason::CodeRejected
        | Reason::DeviceRejected
        | Reason::KeyRejected
        | Reason::SecretRejected
        | Reason::ClockSkew
        | Reason::RegionDisabled
        | Reason::Throttled
        | Reason::ExchangeUnknown
        | Reason::ExchangeRefused
        | Reason::LeaseLost
        | Reason::LogOffset
        | Reason::MailUnavailable => Code::FailedPrecondition,
        Reason::Unspecified | Reason::Internal => Code::Internal,
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        error.log();
        let metadata: HashMap<String, String> =
            error.metadata().iter().map(|(key, value)| ((*key).into(), value.clone())).collect();
        let mut details = ErrorDetails::new();
        details.set_error_info(error.reason().name(), ERROR_DOMAIN, metadata);
        if let Some(field) = error.field_name() {
            details.add_bad_request_violation(field, error.message());
        }
        Status::with_error_details(code(error.reason()), error.message(), details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_reason_field_and_metadata() {
        let status = Status::from(Error::field("token_code", "six digits").with("a", "b"));
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("FIELD_INVALID", "latchkey"));
        assert_eq!(info.metadata["a"], "b");
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "token_code");
    }

    #[test]
    fn an_internal_cause_stays_inside() {
        let status = Status::from(Error::internal("the secret path /x"));
        assert_eq!(status.code(), Code::Internal);
        assert!(!format!("{status:?}").contains("/x"));
    }
}
