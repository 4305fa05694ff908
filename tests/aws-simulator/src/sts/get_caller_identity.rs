//! `GetCallerIdentity`: who the signature says one is.

use super::CallContext;
use crate::encoding::element;

pub(super) fn perform(call: &CallContext<'_>) -> String {
    format!(
        "{}{}{}",
        element("Arn", &call.caller.arn()),
        element("UserId", &call.caller.unique_id()),
        element("Account", &call.caller.account),
    )
}
