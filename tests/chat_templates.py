"""The parts of real chat templates that show tools, calls and results, one for each kind of template."""

HERMES = """
{%- if tools %}<|im_start|>system
{%- if messages[0].role == 'system' %}{{ '\n' + messages[0].content }}{% endif %}
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first and tools %}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

QWEN_CODER = """
{%- if tools %}<tools>{% for tool in tools %}
<function><name>{{ tool.function.name }}</name>
{%- for key, value in tool.function.parameters.properties | items %}<parameter>{{ key + value.type }}</parameter>
{%- endfor %}</function>{% endfor %}</tools>
<tool_call>
<function=example>
<parameter=name>
value
</parameter>
</function>
</tool_call>{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' + message.content }}
{%- for call in message.tool_calls %}{{ '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' }}{{ value if value is string else value | tojson }}{{ '\n</parameter>\n' }}
{%- endfor %}{{ '</function>\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endfor %}{{ '<|im_start|>assistant\n' }}"""

LLAMA_3 = """{{ bos_token }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- elif message.role == 'tool' or message.role == 'ipython' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"""

MISTRAL = """{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last else ']</s>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{ message.content + '</s>' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}
{%- endif %}
{%- endfor %}"""

GEMMA_3 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
{%- set prefix = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{{- (prefix if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{{ '<start_of_turn>model\n' }}"""

SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLLM_3 = """{{ '<|im_start|>system\n' }}
{%- if xml_tools or python_tools %}### Tools
{%- if xml_tools %}
<tools>{% for tool in xml_tools %}
{{ tool | string }}{% endfor %}
</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>{% endif %}
{%- endif %}{{ '<|im_end|>\n' }}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == 'user' or message.role == 'assistant' %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking == false %}{{ '<think>\n\n</think>\n' }}{% endif %}"""

GRANITE_3 = """
{%- if available_tools %}<|start_of_role|>available_tools<|end_of_role|>{{ available_tools | tojson(indent=4) }}
Respond only with <|tool_call|> followed by a JSON list of tools used.<|end_of_text|>
{% endif %}
{%- for message in messages %}
{{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' }}
{%- endfor %}<|start_of_role|>assistant
{%- if thinking %}{{ ' reasoning' }}{% endif %}<|end_of_role|>"""

LFM_2 = """{{ bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{% set system = system + '\nList of tools: <|tool_list_start|>' + (tools | tojson) %}
{%- set system = system + '<|tool_list_end|>' %}{% endif %}
{%- if system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{% if not (loop.first and message.role == 'system') %}
{%- set content = message.content %}
{%- if message.role == 'tool' %}
{%- set content = '<|tool_response_start|>' + content + '<|tool_response_end|>' %}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endif %}{% endfor %}{{ '<|im_start|>assistant\n' }}"""

DEEPSEEK_R1 = """{{ bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}
{%- endfor %}{{ ns.system }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% endif %}
{%- if message.role == 'assistant' and message.content is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name + '\n```json\n' }}
{{- call.function.arguments + '\n```<｜tool▁call▁end｜>' }}{{ '' if loop.last else '\n' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜>' }}
{%- endif %}
{%- if message.role == 'assistant' and message.content is not none %}
{{- '<｜Assistant｜>' + message.content }}{% endif %}
{%- if message.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' }}{% endif %}
{%- endfor %}{{ '<｜Assistant｜><think>\n' }}"""

HARMONY = """<|start|>system<|message|>Reasoning: {{ reasoning_effort if reasoning_effort else 'medium' }}<|end|>
{%- if tools %}<|start|>developer<|message|># Tools
{%- for tool in tools %}{{ '\ntype ' + tool.function.name + ' = (_: ' + (tool.function.parameters | tojson) + ')' }}
{%- endfor %}<|end|>{% endif %}
{%- set last = namespace(name=none) %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- if message.content and message.thinking %}{{ raise_exception('Cannot pass both content and thinking') }}{% endif %}
{%- if message.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson }}{{ '<|call|>' }}{% set last.name = call.name %}
{%- elif message.role == 'tool' %}
{%- if last.name is none %}{{ raise_exception('Message has tool role, but there was no tool call') }}{% endif %}
{{- '<|start|>functions.' + last.name + ' to=assistant<|message|>' + (message.content | tojson) + '<|end|>' }}
{%- elif message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
{%- elif message.role == 'user' %}{{ '<|start|>user<|message|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}<|start|>assistant"""

GEMMA_4 = """{{ bos_token }}
{%- macro written(value) -%}
{%- if value is string -%}{{ '<|"|>' + value + '<|"|>' }}
{%- elif value is mapping -%}{
{%- for key, inner in value | dictsort %}{{ key }}:{{ written(inner) }}{{ ',' if not loop.last }}{% endfor -%} }
{%- else -%}{{ value | tojson }}{%- endif -%}
{%- endmacro %}
{%- for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}{{ written(tool.function.parameters) }}<tool|>
{%- endfor %}
{%- for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{%- for call in message.tool_calls %}<|tool_call>call:{{ call.function.name }}{{ written(call.function.arguments) }}
{#- #}<tool_call|>{% endfor %}
{{- message.content + '<turn|>\n' }}
{%- endfor %}{{ '<|turn>model\n' }}"""
