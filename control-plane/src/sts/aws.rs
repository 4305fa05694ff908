//! The exchange over the AWS SDK.
//!
//! Three of the SDK's habits are turned off. Retries: a lost answer would be followed by the
//! same code. The credentials chain: only keys given here may sign, never the control plane's
//! own role. The endpoint variables of the process: the host is the region's STS, or what the
//! operator's configuration names.
//!
//! The SDK's input types print the token code in `Debug`; none is ever kept or formatted here.

use std::error::Error as StdError;
use std::time::Duration;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::timeout::TimeoutConfig;
use aws_sdk_sts::config::{BehaviorVersion, Region, SharedCredentialsProvider};
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::RequestId;
use aws_sdk_sts::operation::assume_role::AssumeRoleOutput;
use aws_sdk_sts::types::{PolicyDescriptorType, Tag};
use latchkey_domain::time::Timestamp;
use secrecy::ExposeSecret;

use super::errors::{Class, Told, classify};
use super::{Code, Credentials, Exchange, Identity, Refused, RoleWanted, Sts, Wanted};
use crate::store::BoxFuture;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Region of the global partition that the base configuration carries; every call sets its own.
const BASE_REGION: &str = "us-east-1";

#[derive(Debug)]
pub struct AwsSts {
    base: aws_config::SdkConfig,
    /// Names another STS than the region's; from the operator's configuration only.
    endpoint: Option<String>,
}

impl AwsSts {
    /// Prepares connections. `use_fips` picks the FIPS endpoints.
    pub async fn new(endpoint: Option<String>, use_fips: bool) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_timeout(ANSWER_TIMEOUT)
            .build();
        let base = aws_config::defaults(BehaviorVersion::latest())
            .empty_test_environment()
            .no_credentials()
            .region(Region::from_static(BASE_REGION))
            .use_fips(use_fips)
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .load()
            .await;
        Self { base, endpoint }
    }

    fn client(&self, signer: &Credentials, region: &str) -> Client {
        let credentials = aws_sdk_sts::config::Credentials::new(
            &signer.access_key_id,
            signer.secret_access_key.expose_secret(),
            signer.session_token.as_ref().map(|token| token.expose_secret().to_owned()),
            None,
            "latchkey",
        );
        let mut config = aws_sdk_sts::config::Builder::from(&self.base)
            .region(Region::new(region.to_owned()))
            .credentials_provider(SharedCredentialsProvider::new(credentials));
        if let Some(endpoint) = &self.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Client::from_conf(config.build())
    }
}

impl AwsSts {
    async fn session(
        &self,
        signer: &Credentials,
        code: Option<Code<'_>>,
        wanted: &Wanted,
    ) -> Exchange {
        let client = self.client(signer, &wanted.region);
        let mut call = client.get_session_token().duration_seconds(seconds(wanted.duration));
        if let Some(Code { serial, digits }) = code {
            call = call.serial_number(serial).token_code(digits.expose_secret());
        }
        match call.send().await {
            Ok(output) => {
                let request_id = output.request_id().map(str::to_owned);
                issued(output.credentials, request_id, None)
            }
            Err(error) => answered(said(&error)),
        }
    }

    async fn role(
        &self,
        signer: &Credentials,
        code: Option<Code<'_>>,
        wanted: &Wanted,
        role: &RoleWanted,
    ) -> Exchange {
        let managed = role.policy_arns.iter();
        let managed = managed.map(|arn| PolicyDescriptorType::builder().arn(arn).build());
        let tags: Result<Vec<Tag>, _> = role
            .tags
            .iter()
            .map(|(key, value)| Tag::builder().key(key).value(value).build())
            .collect();
        // Both of each are given.
        let Ok(tags) = tags else { return Exchange::NotReached };
        let mut call = self
            .client(signer, &wanted.region)
            .assume_role()
            .role_arn(&role.arn)
            .role_session_name(&role.session_name)
            .duration_seconds(seconds(wanted.duration))
            .set_source_identity(role.source_identity.clone())
            .set_external_id(role.external_id.clone())
            .set_policy(role.policy.clone())
            .set_policy_arns(Some(managed.collect()).filter(|arns: &Vec<_>| !arns.is_empty()))
            .set_tags(Some(tags).filter(|tags| !tags.is_empty()));
        if let Some(Code { serial, digits }) = code {
            call = call.serial_number(serial).token_code(digits.expose_secret());
        }
        match call.send().await {
            Ok(output) => {
                let request_id = output.request_id().map(str::to_owned);
                let packed = packed_percent(&output);
                issued(output.credentials, request_id, packed)
            }
            Err(error) => answered(said(&error)),
        }
    }
}

/// AWS is about to tell the one in place of the other.
#[expect(deprecated, reason = "what STS has answered so far, and what its regions still do")]
fn packed_percent(output: &AssumeRoleOutput) -> Option<u32> {
    let percent = output.packed_policy_size.or(output.session_token_utilization)?;
    u32::try_from(percent).ok()
}

fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}

fn issued(
    credentials: Option<aws_sdk_sts::types::Credentials>,
    request_id: Option<String>,
    packed_percent: Option<u32>,
) -> Exchange {
    let Some(issued) = credentials else { return Exchange::Unknown { request_id } };
    let expires_at = Timestamp::from_millis(issued.expiration.to_millis().unwrap_or(0));
    let credentials = Credentials {
        access_key_id: issued.access_key_id,
        secret_access_key: issued.secret_access_key.into(),
        session_token: Some(issued.session_token.into()),
        expires_at: Some(expires_at),
    };
    Exchange::Issued { credentials, request_id, packed_percent }
}

fn answered(said: Said) -> Exchange {
    match said {
        Said::No(refused) => Exchange::Refused(refused),
        Said::Nothing { request_id } => Exchange::Unknown { request_id },
        Said::NeverSent => Exchange::NotReached,
    }
}

impl Sts for AwsSts {
    fn exchange<'a>(
        &'a self,
        signer: &'a Credentials,
        code: Option<Code<'a>>,
        wanted: &'a Wanted,
    ) -> BoxFuture<'a, Exchange> {
        Box::pin(async move {
            match &wanted.role {
                None => self.session(signer, code, wanted).await,
                Some(role) => self.role(signer, code, wanted, role).await,
            }
        })
    }

    fn identify<'a>(&'a self, signer: &'a Credentials, region: &'a str) -> BoxFuture<'a, Identity> {
        Box::pin(async move {
            match self.client(signer, region).get_caller_identity().send().await {
                Ok(output) => output.account.map_or(Identity::Unavailable, Identity::Account),
                Err(error) => match said(&error) {
                    Said::No(Refused { class: Class::Throttled, .. })
                    | Said::Nothing { .. }
                    | Said::NeverSent => Identity::Unavailable,
                    Said::No(refused) => Identity::Refused(refused),
                },
            }
        })
    }
}

/// What an error tells about the request.
enum Said {
    No(Refused),
    Nothing { request_id: Option<String> },
    NeverSent,
}

fn said<E>(error: &SdkError<E>) -> Said
where
    E: ProvideErrorMetadata + StdError + 'static,
    SdkError<E>: RequestId,
{
    let request_id = error.request_id().map(str::to_owned);
    match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            match classify(status, answer.err().code(), answer.err().message()) {
                Some(class) => {
                    let told = Told::of(class, answer.err().message().unwrap_or_default());
                    Said::No(Refused { class, request_id, told })
                }
                None => Said::Nothing { request_id },
            }
        }
        SdkError::ConstructionFailure(_) => Said::NeverSent,
        SdkError::DispatchFailure(failure) => {
            let never_connected =
                failure.as_connector_error().is_some_and(|error| never_connected(error));
            if never_connected { Said::NeverSent } else { Said::Nothing { request_id } }
        }
        SdkError::TimeoutError(_) | SdkError::ResponseError(_) => Said::Nothing { request_id },
        // The SDK's enum may grow: what we do not know tells nothing.
        _ => Said::Nothing { request_id },
    }
}

/// Looks for the client's own word that it failed while connecting: only then was nothing sent.
fn never_connected(error: &(dyn StdError + 'static)) -> bool {
    let mut link = Some(error);
    while let Some(error) = link {
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            return error.is_connect();
        }
        link = error.source();
    }
    false
}
