//! `VariableService`.

use latchkey_proto::v1;
use latchkey_proto::v1::variable_scope::Scope as WireScope;
use latchkey_proto::v1::variable_service_server::VariableService;
use tonic::{Request, Response, Status};

use super::{Service, caller, convert, given_code};
use crate::app::variables::{NewVariable, Origin, Scope, VariableView};
use crate::error::Error;
use crate::store::record::variable::Category;

#[tonic::async_trait]
impl VariableService for Service {
    async fn set_variable(
        &self,
        request: Request<v1::SetVariableRequest>,
    ) -> Result<Response<v1::SetVariableResponse>, Status> {
        let caller = caller(&request)?;
        let v1::SetVariableRequest {
            scope,
            name,
            category,
            value,
            sensitive,
            hcl,
            mut token_code,
            mut request_id,
        } = request.into_inner();
        let proof = given_code(&mut token_code, &mut request_id);
        let variable = NewVariable {
            value: value.into(),
            category: read_category(category)?,
            name,
            sensitive,
            hcl,
        };
        let (organization, scope) = read_scope(scope)?;
        let view = self.app.set_variable(&caller, &organization, &scope, variable, proof).await?;
        Ok(Response::new(v1::SetVariableResponse { variable: Some(out(view)) }))
    }

    async fn list_variables(
        &self,
        request: Request<v1::ListVariablesRequest>,
    ) -> Result<Response<v1::ListVariablesResponse>, Status> {
        let caller = caller(&request)?;
        let v1::ListVariablesRequest { scope, page_size, page_token } = request.into_inner();
        let (organization, scope) = read_scope(scope)?;
        let page = convert::page(page_size, page_token);
        let page = self.app.list_variables(&caller, &organization, &scope, page).await?;
        Ok(Response::new(v1::ListVariablesResponse {
            variables: page.items.into_iter().map(out).collect(),
            next_page_token: page.next.unwrap_or_default(),
        }))
    }

    async fn delete_variable(
        &self,
        request: Request<v1::DeleteVariableRequest>,
    ) -> Result<Response<v1::DeleteVariableResponse>, Status> {
        let caller = caller(&request)?;
        let v1::DeleteVariableRequest { scope, name, category, mut token_code, mut request_id } =
            request.into_inner();
        let proof = given_code(&mut token_code, &mut request_id);
        let (organization, scope) = read_scope(scope)?;
        let category = read_category(category)?;
        self.app.delete_variable(&caller, &organization, &scope, (category, &name), proof).await?;
        Ok(Response::new(v1::DeleteVariableResponse {}))
    }

    async fn get_effective_variables(
        &self,
        request: Request<v1::GetEffectiveVariablesRequest>,
    ) -> Result<Response<v1::GetEffectiveVariablesResponse>, Status> {
        let caller = caller(&request)?;
        let v1::GetEffectiveVariablesRequest { organization, environment } = request.into_inner();
        let found = self.app.effective_variables(&caller, &organization, &environment).await?;
        let variables = found.into_iter().map(|variable| v1::EffectiveVariable {
            name: variable.name,
            category: category_out(variable.category).into(),
            sensitive: variable.sensitive,
            hcl: variable.hcl,
            origin: match variable.origin {
                Origin::Organization => v1::VariableOrigin::Organization,
                Origin::Environment => v1::VariableOrigin::Environment,
                Origin::Personal => v1::VariableOrigin::Personal,
            }
            .into(),
            shadowed: variable.shadowed,
        });
        Ok(Response::new(v1::GetEffectiveVariablesResponse { variables: variables.collect() }))
    }
}

fn read_scope(scope: Option<v1::VariableScope>) -> Result<(String, Scope), Error> {
    let unclear = || {
        let message = "name an environment, or say whole_organization or personal";
        Error::field("scope", message)
    };
    let v1::VariableScope { organization, scope } = scope.ok_or_else(unclear)?;
    let scope = match scope {
        Some(WireScope::Environment(name)) => Scope::Environment(name),
        Some(WireScope::WholeOrganization(true)) => Scope::Organization,
        Some(WireScope::Personal(true)) => Scope::Personal,
        Some(WireScope::WholeOrganization(false) | WireScope::Personal(false)) | None => {
            return Err(unclear());
        }
    };
    Ok((organization, scope))
}

pub(super) fn read_category(category: i32) -> Result<Category, Error> {
    match v1::VariableCategory::try_from(category) {
        Ok(v1::VariableCategory::Terraform) => Ok(Category::Terraform),
        Ok(v1::VariableCategory::Environment) => Ok(Category::Environment),
        Ok(v1::VariableCategory::Unspecified) | Err(_) => {
            Err(Error::field("category", "say TERRAFORM or ENVIRONMENT"))
        }
    }
}

const fn category_out(category: Category) -> v1::VariableCategory {
    match category {
        Category::Terraform => v1::VariableCategory::Terraform,
        Category::Environment => v1::VariableCategory::Environment,
    }
}

fn out(view: VariableView) -> v1::Variable {
    let VariableView { record, value } = view;
    v1::Variable {
        name: record.name,
        category: category_out(record.category).into(),
        sensitive: record.sensitive,
        hcl: record.hcl,
        value,
        update_time: Some(convert::timestamp(record.updated_at.into())),
    }
}
